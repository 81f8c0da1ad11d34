"""Measure how cost grows: one size at a time, from 33,280 words, 200 units, 20 columns and 2 layers.

Training is measured beside the loop of the PyTorch tutorial, in turn with it, each in a fresh process: the median of a
few steps, and the peak memory. Comparisons and probes are measured once, in fresh processes.
"""

import argparse
import json
from collections.abc import Iterable

import torch

from benchmarks.growth import comparing, probing, training
from benchmarks.growth.axes import GrowthAxis
from benchmarks.measure import Row, machine, new_file, old_file, spread
from roundoff.cli import OneLineParser, whole
from roundoff.runs.json_text import to_json

AXES: dict[str, GrowthAxis] = {**training.AXES, **comparing.AXES, **probing.AXES}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(prog="python -m benchmarks growth", description=__doc__, allow_abbrev=False)
    parser.add_argument("axes", nargs="*", metavar="AXIS", help=f"of {', '.join(AXES)}; all if none is given")
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads(), metavar="N", help="of torch")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write machine and results there")
    parser.add_argument("--read", type=old_file, metavar="FILE", help="measure nothing; take what --json has written")
    parser.add_argument("--picture", type=new_file, metavar="FILE", help="draw the results there, as PNG")
    args = parser.parse_args(argv)
    for axis in args.axes:
        if axis not in AXES:
            parser.error(f"there is no axis {axis!r}; choose from {', '.join(AXES)}")
    return args


def measure(names: Iterable[str]) -> list[Row]:
    """Measure and print the axes `names`."""
    rows = []
    for name in names:
        for at in AXES[name].values:
            for variant, (seconds, mib) in AXES[name].measure(at).items():
                found = spread(seconds)
                print(f"{name:14} {at:>9,} {variant:10} {found['median']:8.3f} s {mib:8.0f} MiB", flush=True)
                rows.append({"axis": name, "at": at, "name": variant, "seconds": found, "mib": mib})
    return rows


def main(argv: list[str]) -> int:
    """Measure, print and draw."""
    args = parse_args(argv)
    if args.read:
        rows = json.loads(args.read.read_text(encoding="utf-8"))["results"]
    else:
        torch.set_num_threads(args.threads)
        about = machine() | {"command": ["growth", *argv]}
        rows = measure(args.axes or AXES)
        if args.json:
            args.json.write_text(to_json({"machine": about, "results": rows}, indent=2) + "\n", encoding="utf-8")
    if args.picture:
        from benchmarks.growth.picture import draw  # here, since matplotlib is an extra

        draw(args.picture, AXES, rows)
    return 0
