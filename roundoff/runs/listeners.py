"""Tell listeners, such as the terminal or an experiment tracker, of the rows of a run as it goes.

The training loop tells the run directory alone, and knows no listener.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Hears of the rows of a run once they have been written, and of its end just before. Only rank 0 calls it.

    Every value in a row is a plain bool, int, float or str; None stands in `result` where nothing is known.

    A subclass may leave out methods. A method that raises costs neither the record nor other listeners their news:
    files are written first, and all listeners are told. Then the call of `RunDirectory` raises that error, with a note
    on whose it is.
    """

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Hear that training begins, or goes on after `step` steps; `config` is `config.json`.

        In a new run that was not told its device, the first step adds that.
        """

    def interval(self, row: dict[str, Any]) -> None:
        """Hear that an interval has ended: so many steps as were asked for, or fewer at the end of an epoch.

        `row` has `step`, `epoch`, `lr` and `loss_scale` of the last step, `loss` (mean), `skipped` (how many steps were
        not applied), `ms_per_batch`, and `tokens_per_second` where the loop counts tokens. Where the norms are known it
        has `grad_norm` (mean of the steps that were applied; nan where none was). It has figures that follow from the
        loss, such as `ppl`, and what the loop adds, such as `batch` (how many of the epoch are done) and `batches` (how
        many it has).
        """

    def epoch(self, row: dict[str, Any]) -> None:
        """Hear that an epoch has been validated; `row` is that of `epochs.jsonl`, with `step`, how many there were."""

    def result(self, row: dict[str, Any]) -> None:
        """Hear that the run has ended; `row` is `result.json`. The best model is in its place, if there is one."""


_listeners: list[Listener] = []


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Let `listener` hear of every run of this process that starts within the block."""
    _listeners.append(listener)
    try:
        yield
    finally:
        _listeners.remove(listener)


def current_listeners() -> list[Listener]:
    """Return the listeners of the `listening` blocks around."""
    return list(_listeners)
