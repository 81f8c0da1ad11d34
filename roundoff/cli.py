"""Give every command line of the project the same errors, help, switches, bounds, --version and completion.

Python's argparse itself heeds NO_COLOR where it has colours (from 3.14 on).
"""

import argparse
import math
import os
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import roundoff
from roundoff.errors import UsageError


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def knows(self, word: str) -> bool:
        """Return whether `word`, such as "--lr=5", begins with an option."""
        return word.partition("=")[0] in self._option_string_actions


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


class Switch(argparse.BooleanOptionalAction):
    """An option that is on or off, off by default: `--name`, and `--no-name` to take back what a file has set."""

    def __init__(self, option_strings: Sequence[str], dest: str, help: str, default: Any = False) -> None:
        super().__init__(option_strings, dest, default=default, help=None)
        self.help = help  # Python before 3.13 would add the default to it

    def format_usage(self) -> str:
        """Return only the first name: the list below the usage has all."""
        return self.option_strings[0]


class _Version(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        import torch  # takes seconds, which not every command has to

        print(f"{parser.prog} {roundoff.__version__} (torch {torch.__version__})")
        parser.exit()


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add --version."""
    parser.add_argument(
        "--version", action=_Version, nargs=0, default=argparse.SUPPRESS, help="show this version and torch's, and exit"
    )


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and exit where it asks for completions; that needs argcomplete, which is optional."""
    if "_ARGCOMPLETE" in os.environ:
        import argcomplete

        argcomplete.autocomplete(parser)


def number(
    kind: Callable[[str], float],
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    what: str | None = None,
) -> Callable[[str], float]:
    """Return an argparse type: a number of `kind` in [low, high]; `above` and `below` leave the ends out.

    `what` describes it in the error where the bounds would only be digits to the reader.
    """
    if what is None:
        what = f"a{' whole' if kind is int else ''} number {'above' if above else 'of at least'} {low:g}"
        if high < math.inf:
            what += f" and {'below' if below else 'at most'} {high:g}"

    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        too_low = value <= low if above else value < low
        too_high = value >= high if below else value > high
        if math.isnan(value) or too_low or too_high:
            raise argparse.ArgumentTypeError(f"{text!r} is not {what}")
        return value

    return parse


whole = number(int, 1)
finite_above_0 = number(float, 0, 1e38, above=True)
