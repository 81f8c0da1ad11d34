"""The progress of a comparison on a terminal: all runs, and the batches of the current one."""

import json
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tqdm import tqdm

from roundoff.errors import UsageError
from roundoff.runs.jsonfile import read_object


class Progress:
    """Draws two bars on stderr if that is a terminal, and nothing elsewhere.

    Args:
        runs: how many there are.
        kept: how many of them have ended already.
    """

    def __init__(self, runs: int, kept: int) -> None:
        self.runs = runs
        self.kept = self.ended = kept
        self.batches: int | None = None  # of one run; all have the same corpus and flags
        self.bars = ExitStack()
        # The mean speed since the start: modes differ too much in theirs for the last seconds to tell the rest.
        self.whole = self._bar(f"{kept} of {runs} runs", smoothing=0)
        self.current = self._bar("starting", position=1)

    def _bar(self, text: str, **options: Any) -> "tqdm[Any]":
        bar: tqdm[Any] = tqdm(desc=text, unit="batch", leave=False, disable=None, dynamic_ncols=True, **options)
        self.bars.callback(bar.close)
        return bar

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.bars.close()

    def count(self) -> None:
        """Count one more run as ended."""
        self.ended += 1

    def show(self, running: Sequence[tuple[str, Path]]) -> None:
        """Redraw for the runs under way, a name and a run directory each; the first is the current one."""
        if self.whole.disable or not running:
            return
        for _, folder in running:
            self.batches = self.batches or batches_expected(folder)
        if self.batches is None:
            return
        done = [steps_done(folder) for _, folder in running]
        name = running[0][0]
        if self.current.desc != f"{name}: ":
            self.current.reset(self.batches)
            self.current.set_description(name, refresh=False)
        self._move(self.current, done[0])
        self.whole.total = (self.runs - self.kept) * self.batches
        self.whole.set_description(f"{self.ended} of {self.runs} runs", refresh=False)
        self._move(self.whole, (self.ended - self.kept) * self.batches + sum(done))

    def _move(self, bar: "tqdm[Any]", to: int) -> None:
        bar.update(to - bar.n)
        bar.refresh()  # the time goes on between two flushes of a trainer's records


def batches_expected(run_dir: Path) -> int | None:
    """Return how many batches the run takes if nothing stops it; None before its start."""
    try:
        job = read_object(run_dir / "config.json")["job"]
    except (OSError, UsageError):
        return None
    rows = job["corpus"]["train_tokens"] // job["batch_size"]
    batches: int = job["epochs"] * -(-(rows - 1) // job["bptt"])
    return 1 if job["dry_run"] else min(batches, job["max_steps"] or batches)


def steps_done(run_dir: Path) -> int:
    """Return the number of the last step that is recorded."""
    try:
        with (run_dir / "steps.jsonl").open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - 4096))  # a row is far shorter
            return int(json.loads(file.read().split(b"\n")[-2])["step"])
    except (OSError, ValueError, IndexError):
        return 0
