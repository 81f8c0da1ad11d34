"""The lines that training prints as it goes."""

import math
import time
from typing import Any

from roundoff.runs.directory import RunDirectory
from roundoff.runs.reading import perplexity
from roundoff.terminal import say


class Log:
    """The steps since the last line, which is printed every --log-interval batches.

    Args:
        records: where each interval goes.
        epoch: that begins or goes on.
        batches: that it has.
        words: trained on before.
    """

    def __init__(self, records: RunDirectory, epoch: int, batches: int, words: int) -> None:
        self.records = records
        self.epoch = epoch
        self.batches = batches
        self._begin(words)

    def _begin(self, words: int) -> None:
        self.words = words
        self.steps = self.skipped = 0
        self.loss = self.norm = 0.0
        self.last: dict[str, Any] = {}
        self.start = time.monotonic()

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Count these steps in the next line."""
        for row in rows:
            self.steps += 1
            self.loss += row["loss"]
            self.skipped += not row["applied"]
            self.norm += row["grad_norm"] if row["applied"] else 0.0
            self.last = row

    def line(self, batch: int, words: int) -> None:
        """Print the mean over the steps since the last line, and end the interval."""
        ms = (time.monotonic() - self.start) * 1000 / self.steps
        row = self.end(words)
        lr = f"{row['lr']:.2f}" if row["lr"] >= 0.01 else f"{row['lr']:.2g}"
        text = (
            f"| epoch {self.epoch:3d} | {batch:5d}/{self.batches:5d} batches | lr {lr} "
            f"| ms/batch {ms:5.2f} | loss {row['loss']:5.2f} | ppl {row['ppl']:8.2f}"
        )
        if row["skipped"]:
            text += f" | skipped {row['skipped']} | loss scale {row['loss_scale']:g}"
        say(text)

    def end(self, words: int) -> dict[str, Any]:
        """Record the interval up to here, in which `words` less those before were trained on, and begin another."""
        seconds = time.monotonic() - self.start
        applied = self.steps - self.skipped
        loss = self.loss / self.steps
        row = {name: self.last[name] for name in ("step", "epoch", "lr", "loss_scale")} | {
            "loss": loss,
            "ppl": perplexity(loss),
            "grad_norm": self.norm / applied if applied else math.nan,
            "skipped": self.skipped,
            "tokens_per_second": (words - self.words) / seconds if seconds else math.nan,
        }
        self.records.interval(row)
        self._begin(words)
        return row
