"""Time and memory to read a corpus."""

import time
from pathlib import Path

import torch

from benchmarks import reference
from benchmarks.measure import REFERENCE, Row, compared, interleaved
from benchmarks.processes import fresh
from lm.data.corpus import Corpus


def measure_reading(data: str, rounds: int) -> list[Row]:
    """Measure `Corpus` against the reference's loop: processor time, which other programs change less, and memory."""
    mine = Corpus(data)
    assert all(map(torch.equal, reference.read(data)[0], (mine.train, mine.valid, mine.test)))
    variants = {REFERENCE: lambda: reference.read(data), "Corpus": lambda: Corpus(data)}
    rows = compared("reading", None, interleaved(variants, rounds, clock=time.process_time), faster=False)
    if Path("/proc/self/status").exists():
        peaks = {}
        for name in variants:
            peaks[name] = [fresh(peak_mib, name, data)]
        rows += [row | {"unit": "MiB"} for row in compared("reading", None, peaks, faster=False)]
    return rows


def peak_mib(name: str, data: str) -> float:
    """Return the peak resident memory of one reading, above what this process had before (Linux: /proc)."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = status("VmRSS")
    if name == REFERENCE:
        reference.read(data)
    else:
        Corpus(data)
    return (status("VmHWM") - before) / 1024
