"""Do these precision modes train alike, and if not, from where on and by how much?

Runs the trainers in several modes with the same data, seeds and flags, or reads run directories that are there
already; prints a table with a verdict for each mode and writes report.html, curves.png and summary.json.
"""

# PYTHON_ARGCOMPLETE_OK
import argparse
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from lm.launch.jobs import Training, check_flags, comparison_folder, run_jobs, slot_environments
from lm.options.command_line import check_after_dashes, part_with_trainers
from lm.options.modes import DEFAULT_MODES, MODES, mode_name, mode_names
from roundoff.cli import HelpFormatter, OneLineParser, add_version, complete, whole
from roundoff.errors import RunError, UsageError
from roundoff.extras import require_report
from roundoff.program import exit_code
from roundoff.report.compare_command import RUN_HELP, add_options, default_out, given_run, publish, read_given, settings
from roundoff.runs.reading import Run, read_run
from roundoff.terminal import say
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import Failure

USAGE = """compare.py [options] [-- TRAINER FLAGS...]   run the modes, then compare them
       compare.py [options] RUN [RUN...]           compare run directories"""
EPILOG = """Exit code: 0; 1 if a pair of --expect-equal differs, or if no run left anything to compare; 2 after a
mistake in the command; 130 when interrupted. A mode that fails or diverges is reported, and leaves 0. After an
interrupt, the same command with the same --out continues."""


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line; `flags` are the trainers', None where there is no "--"."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = OneLineParser(
        "compare.py", USAGE, __doc__, epilog=EPILOG, allow_abbrev=False, formatter_class=HelpFormatter
    )
    add_version(parser)
    parser.add_argument("runs", nargs="*", type=given_run, metavar="RUN", help=RUN_HELP)
    parser.add_argument(
        "--modes",
        type=mode_names,
        metavar="A,B",
        help=f"to run, of {', '.join(MODES)}; fp16 and bf16 mean amp-fp16 and amp-bf16 "
        f"(default: {','.join(DEFAULT_MODES)})",
    )
    parser.add_argument(
        "--seeds",
        type=whole,
        metavar="N",
        help="runs of each mode, counting seeds from the trainers' --seed on (default: 1)",
    )
    parser.add_argument(
        "--jobs",
        type=whole,
        metavar="N",
        help="runs at a time, on several GPUs if there are; on the CPU they share its threads, and what they say of "
        "speed cannot be compared with other runs (default: 1)",
    )
    add_options(parser)
    parser.add_argument(
        "--probe",
        action="store_true",
        help="measure too what each mode does to the gradient, at the initial and the final weights of the reference; "
        "probe.py, on the CPU",
    )
    complete(parser)
    part_with_trainers(parser)
    args = parser.parse_intermixed_args(argv[:end])
    args.flags = argv[end + 1 :] if end < len(argv) else None
    check_after_dashes(parser, args.flags or [])
    given = [f"--{name}" for name in ("modes", "seeds", "jobs") if getattr(args, name) is not None]
    given += ["--probe"] if args.probe else []
    given += ["--"] if args.flags is not None else []
    if args.runs and given:
        parser.error(f"{given[0]} is for modes to run, and RUN is one that has run; give one of them")
    if not args.runs:
        args.reference = args.reference and mode_name(args.reference)
        args.expect_equal = [(mode_name(a), mode_name(b)) for a, b in args.expect_equal or []]
    args.out = args.out or default_out()
    return args


def run_modes(args: argparse.Namespace) -> tuple[list[Run], list[Failure]]:
    """Run what is asked for, as far as it has not been run before; return what came of it."""
    labels, count, at_once = args.modes or list(DEFAULT_MODES), args.seeds or 1, args.jobs or 1
    named = [args.reference or labels[0], *itertools.chain(*(args.expect_equal or []))]
    if unknown := [label for label in named if label not in labels]:
        raise UsageError(f"--reference or --expect-equal: {unknown[0]!r} is not one of --modes {','.join(labels)}")
    first_seed, options, device = check_flags(labels, args.flags or [])
    seeds = list(range(first_seed, first_seed + count))
    # One thread more or less changes sums in their last bits, so --jobs is part of what was asked for.
    with comparison_folder(args.out, {"modes": labels, "seeds": seeds, "options": options, "jobs": at_once}) as lock:
        jobs = [
            Training(label, seed, args.out / "runs" / f"{label}-{seed}", options) for seed in seeds for label in labels
        ]
        say(f"| {len(jobs)} runs in {args.out}")
        with continued_by_hand(args.out):
            failures = run_jobs(jobs, slot_environments(min(at_once, len(jobs)), device), lock)
    runs = []
    for job in jobs:
        try:
            runs.append(read_run(job.run_dir))
        except UsageError as error:
            if all((failure.label, failure.seed) != (job.label, job.seed) for failure in failures):
                failures.append(Failure(job.label, job.seed, job.command, 0, str(error)))
    if not runs:
        names = ", ".join(f"{job.label} seed {job.seed}" for job in jobs)
        raise RunError(f"no run left anything to compare ({names}); the first one: {failures[0].message}")
    return runs, failures


@contextmanager
def continued_by_hand(out: Path) -> Iterator[None]:
    """Say after an interrupt how to go on."""
    try:
        yield
    except KeyboardInterrupt:
        print(f"interrupted; the same command with --out {out} continues", file=sys.stderr)
        raise


def main() -> int:
    """Run or read, compare, print and write."""
    args = parse_args(sys.argv[1:])
    require_report()
    if args.runs:
        runs, failures = read_given(args.runs), list[Failure]()
    else:
        runs, failures = run_modes(args)
    comparison = compare_runs(runs, failures, **settings(args))
    if args.probe:
        from lm.launch.probe_jobs import run_probes  # here, since torch takes seconds

        with continued_by_hand(args.out):
            comparison = replace(comparison, probes=run_probes(args.out, comparison))
    publish(comparison, args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
