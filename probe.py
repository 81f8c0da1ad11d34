"""Measure what a precision mode does to the gradient.

All modes have the same weights, batches, hidden states and dropout masks. The probe measures how far each mode's
gradient is from the true one, compared with how far one batch's gradient is from another's. It counts what is flushed,
subnormal and overflows at every loss scale, and says which scale to take. It takes no step, and a minute or a few
instead of many training runs.
"""

# PYTHON_ARGCOMPLETE_OK
import argparse
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm.data.corpora import DEFAULT
from lm.launch.probing.flags import OF_MODEL, read_flags
from lm.options.command_line import check_after_dashes, part_with_trainers
from lm.options.modes import MODES, PROBED, mode_names
from roundoff.cli import HelpFormatter, OneLineParser, add_version, complete, number, whole
from roundoff.errors import UsageError
from roundoff.extras import require_report
from roundoff.program import exit_code
from roundoff.runs.files import check_writable

if TYPE_CHECKING:
    from lm.launch.probing.mode import Precisions
    from lm.launch.probing.sources import Source

FILES = ("probe.json", "probe.html", "probe.png")
USAGE = "probe.py [options] [-- TRAINER FLAGS...]"
EPILOG = """After -- go flags of the trainers for the model, the batches and the update, such as --nhid 650; see main.py
--help. Exit code: 0; 1 if it failed; 2 after a mistake in the command; 130 when interrupted, which leaves nothing."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line; `flags` are the trainers'."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser("probe.py", USAGE, __doc__, epilog=EPILOG, allow_abbrev=False, formatter_class=HelpFormatter)
    add_version(parser)
    weights = parser.add_mutually_exclusive_group()
    weights.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="weights that --save wrote, or a run directory, for those of its best model (default: fresh ones)",
    )
    weights.add_argument(
        "--run",
        type=Path,
        metavar="RUN_DIR",
        help="the fp32 weights of a run's last checkpoint, with its flags and data",
    )
    parser.add_argument("--data", metavar="FOLDER", help=f"as of the trainers (default: {DEFAULT}, or that of the run)")
    parser.add_argument("--batches", type=whole, default=32, metavar="N", help="how many, from the start of the text")
    parser.add_argument(
        "--modes",
        type=mode_names,
        default=list(PROBED),
        metavar="A,B",
        help=f"of {', '.join(MODES)}; fp16 and bf16 mean amp-fp16 and amp-bf16",
    )
    parser.add_argument(
        "--flush-limit",
        type=number(float, 0, 1, above=True),
        default=1e-3,
        metavar="SHARE",
        help="a loss scale serves that flushes less than this of every gradient",
    )
    parser.add_argument("--out", type=Path, metavar="DIR", help="results go here (default: runs/probe-<time>)")
    complete(parser)
    part_with_trainers(parser)
    args = parser.parse_args(argv[:end])
    args.flags = argv[end + 1 :]
    check_after_dashes(parser, args.flags)
    args.out = args.out or Path("runs") / f"probe-{time.strftime('%Y%m%d-%H%M%S')}"
    return args


def check_out(out: Path) -> None:
    """Raise UsageError unless the results can go to `out` without replacing a file; leave nothing behind."""
    there = out
    while not os.path.lexists(there) and there != there.parent:
        there = there.parent
    if not there.is_dir():
        raise UsageError(f"--out {out}: {there} is no directory; give another")
    for name in FILES:
        if os.path.lexists(out / name):
            raise UsageError(f"--out {out} holds a {name} already; give a new directory")
    check_writable("--out", there / FILES[0])


def precisions() -> "Precisions":
    """Return the `make_precision` of every trainer."""
    import main as fp32_or_manual  # here, as below: torch takes seconds, which --help and a mistake do not have
    import main_amp
    import main_fp16_optimizer

    return {
        "main": fp32_or_manual.make_precision,
        "main_fp16_optimizer": main_fp16_optimizer.make_precision,
        "main_amp": main_amp.make_precision,
    }


def find_source(args: argparse.Namespace) -> "Source":
    """Find what the command line asks to be probed."""
    from lm.launch.probing.sources import fresh, from_checkpoint, from_run

    if args.run is not None:
        return from_run(args.run, args.data, args.flags, precisions())
    if args.checkpoint is not None:
        return from_checkpoint(args.checkpoint, args.data, args.flags)
    return fresh(args.data or DEFAULT, args.flags)


def report(out: Path, result: dict[str, Any]) -> None:
    """Print the table and write `FILES` into the folder `out`."""
    from roundoff.gradients.result import write_probe
    from roundoff.report.probe_html import write_html  # here, since what draws takes 50 MB that measuring needs
    from roundoff.report.probe_png import write_png
    from roundoff.report.probe_table import table
    from roundoff.terminal import say

    say(table(result))
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error.strerror}); give another directory") from None
    for name, write in zip(FILES, (write_probe, write_html, write_png), strict=True):
        write(out / name, result)
    say(f"The report is in {out / 'probe.html'}, with probe.png and probe.json beside it.")


def main() -> int:
    """Probe, print and write."""
    args = parse_args(sys.argv[1:])
    check_out(args.out)
    require_report()
    if args.run is None:
        read_flags(args.flags, OF_MODEL if args.checkpoint else ())  # a mistake in them is told before torch is there
    from lm.launch.probing.run import run_probe

    source = find_source(args)
    command = ["probe.py", *sys.argv[1:]]
    result = run_probe(source, args.modes, args.batches, args.flush_limit, command, precisions())
    report(args.out, result)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
