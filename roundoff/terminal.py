"""The terminal: lines on stdout, progress bars on stderr, and the listener that prints how a run goes."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from roundoff import processes

WIDTH = 89
T = TypeVar("T")


def say(line: str) -> None:
    """Print one line on stdout, above the progress bar where there is one. In a distributed run, rank 0 prints."""
    if processes.rank() > 0:
        return
    with tqdm.external_write_mode():
        print(line, flush=True)


def progress_bar(batches: Sequence[T], text: str, done: int = 0, total: int | None = None) -> "tqdm[T]":
    """Return `batches` with a bar on stderr, where stderr is a terminal; `done` of `total` lie behind already."""
    hidden = None if processes.rank() == 0 else True
    total = total or len(batches)
    return tqdm(batches, desc=text, unit="batch", leave=False, disable=hidden, initial=done, total=total)


class Terminal:
    """A listener that prints a line for each interval, and its figures for each epoch and for the end of training.

    Args:
        every: number of batches between two lines. An interval that ends elsewhere, with its epoch, has no line.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every

    def start(self, directory: Path, config: dict[str, Any], step: int) -> None:
        """Print nothing."""

    def interval(self, row: dict[str, Any]) -> None:
        """Print the line of an interval, which says how many steps were skipped, if any were."""
        batch = row.get("batch", row["step"])
        if batch % self.every:
            return
        place = f"{batch:5d}/{row['batches']:5d} batches" if "batches" in row else f"step {batch:7d}"
        lr = f"{row['lr']:.2f}" if row["lr"] >= 0.01 else f"{row['lr']:.2g}"
        text = f"| epoch {row['epoch']:3d} | {place} | lr {lr} | ms/batch {row['ms_per_batch']:5.2f} {_losses(row)}"
        if row["skipped"]:
            text += f" | skipped {row['skipped']} | loss scale {row['loss_scale']:g}"
        say(text)

    def epoch(self, row: dict[str, Any]) -> None:
        """Print the validation of an epoch."""
        say("-" * WIDTH)
        say(f"| end of epoch {row['epoch']:3d} | time: {row['seconds']:5.2f}s {_losses(row, 'valid')}")
        say("-" * WIDTH)

    def result(self, row: dict[str, Any]) -> None:
        """Print the test, if there was one."""
        if row["test_loss"] is None:
            return
        say("=" * WIDTH)
        say(f"| End of training {_losses(row, 'test')}")
        say("=" * WIDTH)


def _losses(row: dict[str, Any], part: str = "") -> str:
    """Return the loss of `part` of a row as text, with its perplexity where the row has one."""
    name, prefix = (f"{part} ", f"{part}_") if part else ("", "")
    ppl = f" | {name}ppl {row[f'{prefix}ppl']:8.2f}" if f"{prefix}ppl" in row else ""
    return f"| {name}loss {row[f'{prefix}loss']:5.2f}{ppl}"
