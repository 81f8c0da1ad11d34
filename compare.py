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
from roundoff.cli import HelpFormatter, OneLineParser, add_version, complete, number, whole
from roundoff.errors import RunError, UsageError
from roundoff.extras import require_report
from roundoff.program import exit_code
from roundoff.report.compare_command import RUN_HELP, add_options, default_out, given_run, publish, read_given, settings
from roundoff.runs.reading import Run, read_run
from roundoff.terminal import say
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.sequential import MOST, Auto, open_modes
from roundoff.verdict.statistics import ENOUGH_PAIRS
from roundoff.verdict.types import Comparison, Failure

USAGE = """compare.py [options] [-- TRAINER FLAGS...]   run the modes, then compare them
       compare.py [options] RUN [RUN...]           compare run directories"""
EPILOG = """Exit code: 0; 1 if a pair of --expect-equal differs, one of --expect-equivalent is not shown to be
equivalent, or no run left anything to compare; 2 after a mistake in the command; 130 when interrupted. A mode that
fails or diverges is reported, and leaves 0. After an interrupt, the same command with the same --out continues."""


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
        type=seed_count,
        metavar="N",
        help="runs of each mode, counting seeds from the trainers' --seed on (default: 1); auto adds seeds until every "
        f"mode is decided, up to {MOST} or N of auto:N",
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
        for name in ("expect_equal", "expect_equivalent"):
            pairs = getattr(args, name) or []
            setattr(args, name, [(mode_name(a), mode_name(b)) for a, b in pairs])
    args.out = args.out or default_out()
    return args


def seed_count(text: str) -> int | Auto:
    """Read a number of seeds, "auto" or "auto:N"; an argparse type."""
    word, colon, most = text.partition(":")
    if word != "auto":
        return int(whole(text))
    return Auto(int(number(int, ENOUGH_PAIRS)(most))) if colon else Auto()


def run_modes(args: argparse.Namespace) -> Comparison:
    """Run what is asked for, as far as it has not been run before, and compare it.

    Raises:
        RunError: no run left anything.
    """
    labels, asked, at_once = args.modes or list(DEFAULT_MODES), args.seeds or 1, args.jobs or 1
    named = [args.reference or labels[0], *itertools.chain(*args.expect_equal, *args.expect_equivalent)]
    if unknown := [label for label in named if label not in labels]:
        flags = "--reference, --expect-equal or --expect-equivalent"
        raise UsageError(f"{flags}: {unknown[0]!r} is not one of --modes {','.join(labels)}")
    first_seed, options, device = check_flags(labels, args.flags or [])
    looks = asked.looks if isinstance(asked, Auto) else [asked]
    seeds = [first_seed + i for i in range(looks[-1])]
    said_seeds = f"auto:{asked.most} from {first_seed}" if isinstance(asked, Auto) else seeds
    # One thread more or less changes sums in their last bits, so --jobs is part of what was asked for.
    plan = {"modes": labels, "seeds": said_seeds, "options": options, "jobs": at_once}
    runs, failures = list[Run](), list[Failure]()
    with comparison_folder(args.out, plan) as lock, continued_by_hand(args.out):
        for before, count in itertools.pairwise([0, *looks]):
            pairs = itertools.product(seeds[before:count], labels)
            jobs = [Training(label, seed, args.out / "runs" / f"{label}-{seed}", options) for seed, label in pairs]
            say(f"| {len(jobs)} runs in {args.out}")
            failures += run_jobs(jobs, slot_environments(min(at_once, len(jobs)), device), lock)
            read_jobs(jobs, runs, failures)
            if not runs:
                names = ", ".join(f"{job.label} seed {job.seed}" for job in jobs)
                raise RunError(f"no run left anything to compare ({names}); the first one: {failures[0].message}")
            comparison = compare_runs(runs, failures, **settings(args), looks=len(looks))
            if not isinstance(asked, Auto) or all_decided(comparison, count, looks):
                break
    return comparison


def all_decided(comparison: Comparison, count: int, looks: list[int]) -> bool:
    """Return whether `count` seeds decide every mode; say which ones they do not, and what follows."""
    still = open_modes(comparison)
    if still:
        following = [f"{look} seeds are next" for look in looks if look > count] or ["no more were asked for"]
        say(f"| {count} seeds leave undecided: {', '.join(still)}; {following[0]}")
    return not still


def read_jobs(jobs: list[Training], runs: list[Run], failures: list[Failure]) -> None:
    """Add to `runs` those that `jobs` left, and to `failures` what cannot be read."""
    for job in jobs:
        try:
            runs.append(read_run(job.run_dir))
        except UsageError as error:
            if all((failure.label, failure.seed) != (job.label, job.seed) for failure in failures):
                failures.append(Failure(job.label, job.seed, job.command, 0, str(error)))


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
    comparison = compare_runs(read_given(args.runs), **settings(args)) if args.runs else run_modes(args)
    if args.probe:
        from lm.launch.probe_jobs import run_probes  # here, since torch takes seconds

        with continued_by_hand(args.out):
            comparison = replace(comparison, probes=run_probes(args.out, comparison))
    publish(comparison, args)
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
