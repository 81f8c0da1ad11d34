"""Foretells the gradient that will come into a loss, so that work of the backward pass can be done in the forward pass.

A loss is multiplied by the loss scale and by its part's share of the batch, which are the same for thousands of steps.
So the gradient of the last losses of the same origin (model and rows) is nearly always that of the next one. It is
foretold once it came twice in a row: a user whose loss has another weight at every step pays for no wrong guess.
"""

from collections.abc import Hashable

KEPT = 8
"""Origins that are remembered: a run has a few, for its batches, their parts and an epoch's last batch."""

_seen: dict[Hashable, tuple[float, bool]] = {}
"""Origin -> the last gradient, and whether it came twice in a row; the one seen last is the last."""


def foretold(origin: Hashable) -> float | None:
    """Return the gradient that the next loss of this origin will most likely get; None where nobody can tell."""
    gradient, twice = _seen.get(origin, (0.0, False))
    return gradient if twice else None


def saw(origin: Hashable, gradient: float) -> None:
    """Remember the gradient that a loss of this origin got."""
    before, _ = _seen.pop(origin, (0.0, False))
    # Never 0.0, which is -0.0 too, nor nan, which equals nothing: numbers that are equal have the same bits.
    _seen[origin] = gradient, gradient == before != 0.0
    if len(_seen) > KEPT:
        del _seen[next(iter(_seen))]
