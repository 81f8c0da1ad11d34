"""Adds seeds until every mode is decided, and looks only at numbers of seeds that were planned before.

Who tests after each seed, and stops at the first verdict, errs far more often than in 5% (Armitage, McPherson and Rowe,
J. R. Stat. Soc. A 132, 1969). So each of K planned looks has 5%/K of the risk. By Bonferroni's inequality an error at
any of them has a probability of at most 5%, however the looks depend on each other. The intervals are those of
1 - 5%/K at each look, so that those of all looks together cover 95%: they are repeated confidence intervals (Jennison
and Turnbull, J. R. Stat. Soc. B 51, 1989). Sharper boundaries exist; they need normal sums of known variance.
"""

from typing import NamedTuple

from roundoff.verdict.types import Comparison

LOOKS = (3, 5, 8, 12, 20, 32, 50, 80, 120, 200)
"""Numbers of seeds at which the verdicts are looked at."""
MOST = 20
"""Seeds of a mode, unless another number is asked for."""
OPEN = ("undecided", "described")
"""Verdicts that more seeds may change. One that failed or diverged is decided."""


class Auto(NamedTuple):
    """The wish for as many seeds as decide, and no more than `most`."""

    most: int = MOST

    @property
    def looks(self) -> list[int]:
        """Return the numbers of seeds to look at, in ascending order; the last one is `most`."""
        return [count for count in LOOKS if count < self.most] + [self.most]


def open_modes(comparison: Comparison) -> list[str]:
    """Return the labels of the modes that more seeds may decide."""
    return [mode.label for mode in comparison.modes if mode.verdict.word in OPEN]
