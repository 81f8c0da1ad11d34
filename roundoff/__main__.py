"""The program `roundoff`, which is also `python -m roundoff`: a sub-command for each thing that it does."""

# PYTHON_ARGCOMPLETE_OK
import argparse
import sys

from roundoff.cli import HelpFormatter, OneLineParser, add_version, complete
from roundoff.extras import require_report
from roundoff.program import exit_code
from roundoff.report.compare_command import RUN_HELP, add_options, default_out, given_run, publish, read_given, settings

COMPARE = """Do these runs train alike, and if not, from which step on and by how much? Reads run directories, prints a
table with a verdict for each mode, and writes report.html, curves.png and summary.json."""
EPILOG = """Exit code: 0; 1 if a pair of --expect-equal differs, or one of --expect-equivalent is not shown to be
equivalent; 2 after a mistake in the command; 130 when interrupted."""


def parse_args(words: list[str]) -> argparse.Namespace:
    """Read the command line `words`."""
    parser = OneLineParser("roundoff", description="Compare runs of mixed-precision training.", allow_abbrev=False)
    add_version(parser)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    comparison = commands.add_parser(
        "compare",
        help="put run directories side by side",
        description=COMPARE,
        epilog=EPILOG,
        allow_abbrev=False,
        formatter_class=HelpFormatter,
    )
    comparison.add_argument("runs", nargs="+", type=given_run, metavar="RUN", help=RUN_HELP)
    add_options(comparison)
    complete(parser)
    args, rest = parser.parse_known_args(words)
    if unknown := [word for word in rest if word.startswith("-")]:
        comparison.unrecognized(unknown)
    args.runs += map(given_run, rest)  # argparse leaves the directories that follow an option
    args.out = args.out or default_out()
    return args


def run() -> int:
    """Do what the command line asks for."""
    args = parse_args(sys.argv[1:])
    require_report()
    from roundoff.verdict.comparison import compare_runs

    publish(compare_runs(read_given(args.runs), **settings(args)), args)
    return 0


def main() -> int:
    """Run the program and return its exit code."""
    return exit_code(run)


if __name__ == "__main__":
    sys.exit(main())
