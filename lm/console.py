"""What a run shows on the terminal."""

import time
from typing import Any

from tqdm import tqdm

from lm import distributed
from lm.records import perplexity


def say(line: str) -> None:
    """Print one line on stdout, above the progress bar where there is one; in a distributed run, on rank 0."""
    if distributed.rank() > 0:
        return
    with tqdm.external_write_mode():
        print(line, flush=True)


def progress_bar(batches: range, text: str, done: int = 0, total: int | None = None) -> "tqdm[int]":
    """`batches` with a bar on stderr, where that is a terminal; `done` of `total` lie behind already."""
    hidden = None if distributed.rank() == 0 else True
    total = total or len(batches)
    return tqdm(batches, desc=text, unit="batch", leave=False, disable=hidden, initial=done, total=total)


class Log:
    """The line that is printed every --log-interval batches."""

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch = epoch
        self.batches = batches
        self._start_line()

    def _start_line(self) -> None:
        self.steps = self.skipped = 0
        self.loss = 0.0
        self.start = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count these steps in the next line."""
        for row in rows:
            self.steps += 1
            self.loss += row["loss"]
            self.skipped += not row["applied"]
            self.loss_scale = row["loss_scale"]

    def line(self, batch: int, lr: float) -> None:
        """Print the mean over the steps since the last line."""
        ms = (time.monotonic() - self.start) * 1000 / self.steps
        loss = self.loss / self.steps
        text = (
            f"| epoch {self.epoch:3d} | {batch:5d}/{self.batches:5d} batches | lr {lr:02.2f} "
            f"| ms/batch {ms:5.2f} | loss {loss:5.2f} | ppl {perplexity(loss):8.2f}"
        )
        if self.skipped:
            text += f" | skipped {self.skipped} | loss scale {self.loss_scale:g}"
        say(text)
        self._start_line()
