"""The meter of an interval, which makes one row of all steps since the row before, and the figures of a row."""

import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

NO_CURVES = ("step", "epoch", "batch", "batches", "ms_per_batch")
"""Entries of an interval or an epoch that say where a run is, and that no tracker draws."""

Derived = Mapping[str, Callable[[float], float]]
"""Figures that follow from a mean loss, by name, such as {"ppl": perplexity}."""


def losses(loss: float | None, derived: Derived, prefix: str = "") -> dict[str, float | None]:
    """Return `loss` and the figures that follow from it as entries of a row; without a loss they are None."""
    figures = {prefix + name: None if loss is None else figure(loss) for name, figure in derived.items()}
    return {f"{prefix}loss": loss} | figures


def curves(row: dict[str, Any]) -> dict[str, Any]:
    """Return the entries of an interval or an epoch that a tracker draws."""
    return {name: value for name, value in row.items() if name not in NO_CURVES}


class Meter:
    """Counts steps until `end` makes one row of them. Its clock starts with it, and again at each end.

    Args:
        derived: figures to put beside the mean loss.

    Attributes:
        steps: counted since the last row.
    """

    def __init__(self, derived: Derived) -> None:
        self._derived = derived
        self.restart()

    def restart(self) -> None:
        """Forget all steps, and start the clock."""
        self.steps = self._skipped = self._tokens = 0
        self._loss = self._norm = 0.0
        self._knows_norm = False
        self._last: dict[str, Any] = {}
        self._start = time.monotonic()

    def add(self, rows: Iterable[dict[str, Any]], tokens: int) -> None:
        """Count the steps of `rows`, in which the model was trained on `tokens` tokens."""
        self._tokens += tokens
        for row in rows:
            self.steps += 1
            self._loss += row["loss"]
            self._skipped += not row["applied"]
            self._norm += row["grad_norm"] if row["applied"] else 0.0
            self._knows_norm |= not math.isnan(row["grad_norm"])
            self._last = row

    def end(self) -> dict[str, Any]:
        """Return the row of the interval (see `Listener.interval`), and begin another interval.

        At least one step must have been counted.
        """
        seconds = time.monotonic() - self._start
        applied = self.steps - self._skipped
        row = {name: self._last[name] for name in ("step", "epoch", "lr", "loss_scale")}
        row |= losses(self._loss / self.steps, self._derived)
        if self._knows_norm or not applied:
            row["grad_norm"] = self._norm / applied if applied else math.nan
        row["skipped"] = self._skipped
        if self._tokens:
            row["tokens_per_second"] = self._tokens / seconds if seconds else math.nan
        row["ms_per_batch"] = seconds * 1000 / self.steps
        self.restart()
        return row
