"""Who else hears what a run records, such as an experiment tracker; the training loop knows none of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol


class Listener(Protocol):
    """Whoever wants to know of a run as it goes, beside its directory. Called in the process of rank 0 alone.

    Every value in a row is a plain bool, int, float or str.
    """

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Training begins, or goes on after `step` steps; `config` is that of `config.json`."""

    def interval(self, row: dict[str, Any]) -> None:
        """A log interval has ended, or an epoch in the middle of one.

        `row` has `step` (the last one), `epoch`, `lr`, `loss` (mean, nats a word), `ppl`, `grad_norm` (mean of the
        steps that were applied; nan where none was), `loss_scale` (of the last step), `skipped` (steps of the
        interval) and `tokens_per_second`.
        """

    def epoch(self, row: dict[str, Any]) -> None:
        """An epoch has been validated; `row` is that of `epochs.jsonl`, and has `step`, how many there were."""

    def result(self, row: dict[str, Any]) -> None:
        """The run has ended; `row` is `result.json`. The best model is in its place, if there is one."""


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
    """Those of the blocks around."""
    return list(_listeners)
