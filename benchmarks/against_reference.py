"""Measure this project against the loop of the PyTorch tutorial, in turn with it, call by call.

Ratios are between neighbours in time, so that a machine that slows down slows both; their median and quartiles
are printed. Memory and start are measured in processes of their own. benchmarks/README.md has the targets.
`python -m benchmarks gpu --help` and `python -m benchmarks growth --help` are other commands.
"""

import argparse
import sys
from contextlib import ExitStack

import torch

from benchmarks.amp_cost import measure_amp
from benchmarks.help_cost import measure_help
from benchmarks.measure import Row, machine, new_file, show
from benchmarks.peaks import measure_peaks, share_of_peak
from benchmarks.probe_cost import measure_probe
from benchmarks.processes import STEPS, measure_memory, measure_start
from benchmarks.reading import measure_reading
from benchmarks.several import measure_processes
from benchmarks.training import VOCABULARY, Jobs, measure_eval, measure_precision, measure_step
from lm.data import corpora
from lm.options.device import find_device
from lm.options.modes import MODES
from roundoff.cli import OneLineParser, whole
from roundoff.runs.json_text import to_json

PARTS = ("step", "eval", "precision", "memory", "reading", "start", "processes", "probe", "help", "peaks", "amp")
DEFAULT_MODES = ["fp32", "manual", "fp16-optimizer", "amp-fp16", "amp-bf16"]
BATCH_SIZE, BPTT = 20, 35
ON_CPU = "reading, start, processes, probe and help"


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = OneLineParser(prog="python -m benchmarks", description=__doc__, allow_abbrev=False)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)}; all if none is given")
    parser.add_argument("--data", default=corpora.DEFAULT, help="the corpus, as for the trainers")
    parser.add_argument(
        "--modes", nargs="+", choices=MODES, default=DEFAULT_MODES, metavar="MODE", help=f"of {', '.join(MODES)}"
    )
    parser.add_argument("--sizes", nargs="+", type=whole, default=[200], metavar="N", help="embedding and hidden units")
    parser.add_argument("--rounds", type=whole, default=15, metavar="N", help="timings of each variant")
    parser.add_argument("--steps", type=whole, default=STEPS, metavar="N", help="of each run of the part memory")
    parser.add_argument("--threads", type=whole, default=torch.get_num_threads(), metavar="N", help="of torch")
    parser.add_argument("--device", default="cpu", help=f"cpu, cuda or cuda:N; {ON_CPU} stay on the CPU")
    parser.add_argument("--json", type=new_file, metavar="FILE", help="write machine and results there")
    args = parser.parse_args()
    unknown = [part for part in args.parts if part not in PARTS]
    if unknown:
        parser.error(f"there is no part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    args.parts = args.parts or list(PARTS)
    args.device = find_device(args.device)
    return args


def measure_without_size(args: argparse.Namespace) -> list[Row]:
    """Measure the parts whose figures depend on no size."""
    rows: list[Row] = []
    if "reading" in args.parts:
        rows += shown(measure_reading(args.data, args.rounds))
    if "help" in args.parts:
        rows += shown(measure_help(args.rounds))
    if "amp" in args.parts:
        rows += shown(measure_amp(args.rounds, args.device))
    return rows


def measure_size(args: argparse.Namespace, size: int) -> list[Row]:
    """Measure the parts whose figures depend on the size of the model."""
    rows: list[Row] = []
    in_process = {"step": measure_step, "eval": measure_eval, "precision": measure_precision}
    with ExitStack() as stack:
        if any(part in args.parts for part in in_process):
            jobs = Jobs(stack, args.data, size, args.modes, args.device)
        for part, measure in in_process.items():
            if part in args.parts:
                rows += shown(measure(jobs, args.rounds))
    if "memory" in args.parts:
        rows += shown(measure_memory(args.data, size, args.modes, min(5, args.rounds), args.device, args.steps))
    if "start" in args.parts:
        rows += shown(measure_start(args.data, size, args.modes, rounds=3))
    if "processes" in args.parts:
        rows += shown(measure_processes(args.data, size, args.rounds))
    if "probe" in args.parts:
        rows += shown(measure_probe(args.data, size, args.rounds))
    return rows


def shown(rows: list[Row]) -> list[Row]:
    """Print `rows` and give them back."""
    for row in rows:
        print(show(row), flush=True)
    return rows


def main() -> int:
    """Measure and print."""
    args = parse_args()
    torch.set_num_threads(args.threads)
    about = machine(args.device) | {"command": sys.argv[1:]}
    for name, value in about.items():
        print(f"{name:16} {value}")
    peaks = shown(measure_peaks(args.device)) if "peaks" in args.parts else []
    rows = measure_without_size(args)
    for size in args.sizes:
        rows += measure_size(args, size)
    if peaks:
        for row in [row for row in rows if row["part"] == "step"]:
            share = share_of_peak(row, peaks, BATCH_SIZE * BPTT, VOCABULARY, args.device)
            rows += shown([row_of_share(row, share)])
    if args.json:
        args.json.write_text(to_json({"machine": about, "results": peaks + rows}, indent=2) + "\n")
    return 0


def row_of_share(step: Row, share: float) -> Row:
    """Return as a row the share of `step` that its matrix products take at this machine's peak."""
    return {"part": "share", "size": step["size"], "name": step["name"], "value": 100 * share, "unit": "% of peak"}
