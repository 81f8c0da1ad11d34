"""What every command line of the project has in common: short errors, defaults in the help, numbers with bounds."""

import argparse
import math
from collections.abc import Callable
from typing import NoReturn

from lm.errors import UsageError, complain


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose complaint is one line, without the usage in front of it."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with 2."""
        complain(f"{message} (see {self.prog} --help)")
        self.exit(UsageError.exit_code)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows the default of each flag that has one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        return action.help if action.default in (None, False) else super()._get_help_string(action)


def number(
    kind: Callable[[str], float],
    low: float,
    high: float = math.inf,
    *,
    above: bool = False,
    below: bool = False,
    what: str | None = None,
) -> Callable[[str], float]:
    """An argparse type: a number of `kind` in [low, high]; `above` and `below` leave the ends out.

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
