"""Tokens a second of two processes with one thread each, beside those of one process with two threads.

`python -m benchmarks.several FILE main.py FLAGS...` runs a trainer, alone or under torchrun, and writes the tokens a
second of each interval of its log to FILE.
"""

import json
import runpy
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measure import REFERENCE, Row, compared
from benchmarks.processes import flags, python, short_evaluation
from roundoff.runs.listeners import Listener, listening

PROCESSES = 2
ROUNDS = 3
INTERVAL, INTERVALS = 10, 4  # steps of one, and how many; the first of them warms up
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node")


def measure_processes(data: str, size: int, rounds: int) -> list[Row]:
    """Measure both in turn, in fp32, each time with processes of their own; the unit is tokens a second."""
    name = f"{PROCESSES} processes"
    starts = {REFERENCE: ((), PROCESSES), name: ((*TORCHRUN, str(PROCESSES)), 1)}
    speeds: dict[str, list[float]] = {name: [] for name in starts}
    with short_evaluation(data) as short:
        for _ in range(min(ROUNDS, rounds)):
            for which, (start, threads) in starts.items():
                speeds[which].append(_speed(start, threads, short, size))
    (row,) = compared("processes", size, speeds, faster=False)
    return [row | {"unit": "tokens/s", "ratio_is": "several processes / one"}]


def _speed(start: tuple[str, ...], threads: int, data: str, size: int) -> float:
    """Return the tokens a second of one run whose processes `start` starts: the median of all intervals but the first.

    Each process has `threads` threads.
    """
    steps = ["--log-interval", str(INTERVAL), "--max-steps", str(INTERVAL * INTERVALS)]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "speeds.json")
        command = [*start, "-m", "benchmarks.several", str(file), *flags("fp32", data, size, folder), *steps]
        python(*command, threads=threads)
        speeds: list[float] = json.loads(file.read_text())
        return statistics.median(speeds[1:])


class Speeds(Listener):
    """Writes the tokens a second of all intervals to `file`."""

    def __init__(self, file: str) -> None:
        self._file, self._speeds = Path(file), list[float]()

    def interval(self, row: dict[str, Any]) -> None:
        """See `Listener`."""
        self._speeds.append(row["tokens_per_second"])
        self._file.write_text(json.dumps(self._speeds))


if __name__ == "__main__":
    del sys.argv[0]
    with listening(Speeds(sys.argv.pop(0))):  # type: ignore[abstract]  # its other methods do nothing
        runpy.run_path(sys.argv[0], run_name="__main__")
