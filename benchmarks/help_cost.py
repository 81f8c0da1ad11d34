"""The time that `--help` takes, beside that of torch's import."""

from functools import partial

from benchmarks.measure import REFERENCE, Row, compared, interleaved
from benchmarks.processes import python

PROGRAMS = ("main.py", "compare.py", "probe.py")
ROUNDS = 10


def measure_help(rounds: int) -> list[Row]:
    """Measure the seconds of fresh processes: the ratio to a process that imports torch, and the shortest of each."""
    variants = {REFERENCE: partial(python, "-c", "import torch")}
    variants |= {f"{program} --help": partial(python, program, "--help") for program in PROGRAMS}
    return rows_of_help(interleaved(variants, min(ROUNDS, rounds)))


def rows_of_help(times: dict[str, list[float]]) -> list[Row]:
    """Return the rows of `times`, in which the reference is torch's import."""
    rows = [row | {"ratio_is": "ours / import torch"} for row in compared("help", None, times, faster=False)]
    names = {name: "import torch" if name == REFERENCE else name for name in times}
    shortest = {f"{names[name]}, shortest": min(values) for name, values in times.items()}
    return rows + [
        {"part": "help", "size": None, "name": name, "value": s, "unit": "s"} for name, s in shortest.items()
    ]
