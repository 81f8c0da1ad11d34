"""The command that compares run directories: its options, and what it prints and writes.

`roundoff compare` and `compare.py` share it.
"""

import argparse
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from roundoff.cli import finite_above_0
from roundoff.errors import RunError, UsageError, printable
from roundoff.runs.files import check_writable

if TYPE_CHECKING:
    from roundoff.runs.reading import Run
    from roundoff.verdict.types import Comparison

FILES = ("summary.json", "report.html", "curves.png")

RUN_HELP = "run directory, finished or not; NAME=RUN calls it so, and runs of one NAME are its seeds"


class GivenRun(NamedTuple):
    """A run directory, and the name that it was given; "" for none."""

    name: str
    path: Path


def given_run(word: str) -> GivenRun:
    """Read RUN or NAME=RUN. A path that is there is a path, whatever is in it.

    Raises:
        UsageError: NAME is empty or has a comma, or there is no such RUN.
    """
    name, equals, path = word.partition("=")
    if not equals or Path(word).exists():
        return GivenRun("", Path(word))
    shown = printable(word)
    if not name.strip() or "," in name:
        raise UsageError(f"{shown}: a NAME=RUN needs a name, which has no comma; give one, such as before=runs/fp32")
    if not path or not Path(path).exists():
        raise UsageError(f"{shown}: there is no run {printable(path)!r} to be called {printable(name)!r}; give another")
    return GivenRun(name, Path(path))


def read_given(given: Sequence[GivenRun]) -> "list[Run]":
    """Read the run directories of a command line, each with its name.

    Raises:
        UsageError: one cannot be read.
    """
    from roundoff.runs.reading import read_run

    runs = [read_run(path) for _, path in given]
    return [replace(run, label=name, named=True) if name else run for run, (name, _) in zip(runs, given, strict=True)]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a comparison to `parser`."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="write the report there (default: runs/compare-<time>)")
    parser.add_argument(
        "--reference", metavar="MODE", help="mode or NAME that the others are compared with (default: fp32)"
    )
    parser.add_argument(
        "--margin",
        type=finite_above_0,
        default=0.01,
        metavar="M",
        help="a difference this small is none, in the losses' own unit",
    )
    parser.add_argument(
        "--expect-equal", type=pair, action="append", metavar="A,B", help="exit with 1 if a loss differs in a bit"
    )
    parser.add_argument(
        "--expect-equivalent",
        type=pair,
        action="append",
        metavar="A,B",
        help="exit with 1 unless B is shown equivalent to A within the margin",
    )
    parser.add_argument(
        "--anyway",
        action="store_true",
        help="compare runs that were given no names and whose job differs, or any whose data or seeds do",
    )


def pair(text: str) -> tuple[str, str]:
    """Read two different names, separated by a comma; an argparse type."""
    first, _, second = text.partition(",")
    if not first or not second or "," in second or first == second:
        raise argparse.ArgumentTypeError(f"{text!r} is not two different modes or names, such as fp32,amp-fp32")
    return first, second


def settings(args: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `roundoff.compare_runs` that the options say."""
    return {
        "reference": args.reference,
        "margin": args.margin,
        "expect_equal": args.expect_equal or [],
        "expect_equivalent": args.expect_equivalent or [],
        "anyway": args.anyway,
        "flags": True,
    }


def default_out() -> Path:
    """Return the folder of a report for which --out names none."""
    return Path("runs") / f"compare-{time.strftime('%Y%m%d-%H%M%S')}"


def publish(comparison: "Comparison", args: argparse.Namespace) -> None:
    """Print the table of `comparison` and write its files to `args.out`.

    Raises:
        UsageError: the files cannot be written.
        RunError: a pair of --expect-equal differs, or one of --expect-equivalent is not shown to be equivalent; the
            files are written.
    """
    from roundoff.report.probe_table import table as probe_table  # here, as below
    from roundoff.report.summary import table
    from roundoff.terminal import say

    _make_folder(args.out)
    say(table(comparison))
    for probe in comparison.probes:
        say(f"\n{probe.title}: {probe.problem or probe.path / 'probe.html'}")
        if probe.result is not None:
            say(probe_table(probe.result, explained=False))
    write_files(args.out, comparison)
    say(f"The report is in {args.out / 'report.html'}, with curves.png and summary.json beside it.")
    equal = {frozenset((p.first, p.second)): p for p in comparison.pairs}
    for both in args.expect_equal or []:
        found = equal[frozenset(both)]
        if not found.equal:
            raise RunError(f"--expect-equal {','.join(both)}: {found.sentence}")
    for each in comparison.equivalences:
        if each.verdict.word != "equivalent":
            raise RunError(f"--expect-equivalent {each.first},{each.second}: {each.sentence}")


def write_files(folder: Path, comparison: "Comparison") -> None:
    """Write `FILES` into `folder`, which must be there."""
    from roundoff.report.html import write_html  # here, since what draws takes a second that --help does not need
    from roundoff.report.png import write_png
    from roundoff.report.summary import write_summary

    for name, write in zip(FILES, (write_summary, write_html, write_png), strict=True):
        write(folder / name, comparison)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot write there ({error.strerror}); give another directory") from None
    for name in FILES:
        check_writable("--out", out / name)
