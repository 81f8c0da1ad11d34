"""Who else hears what a run records, such as an experiment tracker; the training loop knows none of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from roundoff.errors import UsageError


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


def current_listeners(config: dict[str, Any]) -> list[Listener]:
    """Those of the blocks around, and those that the flags in `config` ask for."""
    return [*_listeners, event_files()] if config.get("options", {}).get("tensorboard") else list(_listeners)


def event_files() -> Listener:
    """Whom --tensorboard asks for.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    try:
        from roundoff.runs.event_files import EventFiles
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("lm", "torch"):
            raise
        raise UsageError(
            f"--tensorboard without TensorBoard (no {error.name} here): pip install 'roundoff[tensorboard]', "
            "or leave the flag out (--no-tensorboard, where the resumed run has it): steps.jsonl in the run directory "
            "has the same numbers"
        ) from None
    return EventFiles()
