"""Give every command line of the project the same errors, help, switches, bounds, --version and completion.

Python's argparse itself heeds NO_COLOR where it has colours (from 3.14 on).
"""

import argparse
import difflib
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

import roundoff
from roundoff.errors import UsageError, printable


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage in front of it, and names what was meant.

    Attributes:
        elsewhere: given an unknown flag, such as "--dtype", returns the advice of the program that knows it; else None.
    """

    elsewhere: Callable[[str], str | None] = staticmethod(lambda flag: None)

    def parse_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """See ArgumentParser."""
        found, rest = self.parse_known_args(args, namespace)
        return self._all_known(found, rest)

    def parse_intermixed_args(self, args: Any = None, namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """See ArgumentParser."""
        found, rest = self.parse_known_intermixed_args(args, namespace)
        return self._all_known(found, rest)

    def _all_known(self, found: argparse.Namespace, rest: list[str]) -> argparse.Namespace:
        if rest:
            self.unrecognized(rest)
        return found

    def unrecognized(self, rest: Sequence[str]) -> NoReturn:
        """Raise UsageError: no option takes the words `rest`. Say which option was meant, if one is like them."""
        flags = dict.fromkeys(word.partition("=")[0] for word in rest if word.startswith("--"))
        hints = list(dict.fromkeys(hint for flag in flags if (hint := self._hint(flag))))
        self.error("; ".join([f"unrecognized arguments: {' '.join(rest)}", *hints[:3]]))

    def _hint(self, flag: str) -> str | None:
        if advice := self.elsewhere(flag):
            return advice
        names = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        near = nearest(flag[2:].replace("_", "-"), names)
        return None if near is None else f"did you mean --{near}?"

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, invalid_choice(value, action.choices))

    def error(self, message: str) -> NoReturn:
        """Raise UsageError."""
        raise UsageError(f"{message} (see {self.prog} --help)")

    def knows(self, word: str) -> bool:
        """Return whether `word`, such as "--lr=5", begins with an option."""
        return word.partition("=")[0] in self._option_string_actions


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return that of `known` which `word` is most like, or begins; None if it is like none. Case does not count."""
    lower = {name.lower(): name for name in known}
    begun = [name for name in lower if name.startswith(word.lower())] if len(word) > 1 else []
    near = begun if len(begun) == 1 else difflib.get_close_matches(word.lower(), lower, 1)
    return lower[near[0]] if near else None


def invalid_choice(value: Any, choices: Iterable[str]) -> str:
    """Return the complaint that `value` is none of `choices`."""
    allowed = list(choices)
    near = nearest(str(value), allowed)
    hint = f"did you mean {near}? " if near else ""
    return f"invalid choice: {printable(repr(value))} ({hint}choose from {', '.join(allowed)})"


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
