"""What a run shows on the terminal, and how Ctrl-C stops it."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from lm.records import perplexity


def say(line: str) -> None:
    """Print one line on stdout, above the progress bar where there is one."""
    with tqdm.external_write_mode():
        print(line, flush=True)


@contextmanager
def stop_on_interrupt() -> Iterator[threading.Event]:
    """An event that the first Ctrl-C sets, so that a step is never cut in two; the second one ends all at once."""
    interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield interrupted  # only the main thread may handle signals
        return

    def handle(signum: int, frame: Any) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, handle)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


class Log:
    """The line that is printed every --log-interval batches."""

    def __init__(self, epoch: int, batches: int) -> None:
        self.epoch = epoch
        self.batches = batches
        self.rows: list[dict[str, Any]] = []
        self.start = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count these steps in the next line."""
        self.rows += rows

    def line(self, batch: int, lr: float) -> None:
        """Print the mean over the steps since the last line."""
        ms = (time.monotonic() - self.start) * 1000 / len(self.rows)
        loss = sum(row["loss"] for row in self.rows) / len(self.rows)
        skipped = sum(not row["applied"] for row in self.rows)
        text = (
            f"| epoch {self.epoch:3d} | {batch:5d}/{self.batches:5d} batches | lr {lr:02.2f} "
            f"| ms/batch {ms:5.2f} | loss {loss:5.2f} | ppl {perplexity(loss):8.2f}"
        )
        if skipped:
            text += f" | skipped {skipped} | loss scale {self.rows[-1]['loss_scale']:g}"
        say(text)
        self.rows = []
        self.start = time.monotonic()
