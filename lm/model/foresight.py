"""Foretells the gradient that will come into a loss, so that work of the backward pass can be done in the forward pass.

A loss is multiplied by the loss scale and by its part's share of the batch, which are the same for thousands of steps.
So the gradient of the last losses of the same shape is nearly always that of the next one. It is foretold once it came
twice in a row: a user whose loss has another weight at every step pays for no wrong guess.
"""

from collections.abc import Hashable

KEPT = 8
"""Shapes that are remembered: a run has a few, of its batches, their parts and an epoch's last batch."""

_seen: dict[Hashable, tuple[float, bool]] = {}
"""Shape -> the last gradient, and whether it came twice in a row; the shape seen last is the last."""


def foretold(shape: Hashable) -> float | None:
    """Return the gradient that the next loss of this shape will most likely get; None where nobody can tell."""
    gradient, twice = _seen.get(shape, (0.0, False))
    return gradient if twice else None


def saw(shape: Hashable, gradient: float) -> None:
    """Remember the gradient that a loss of this shape got."""
    before, _ = _seen.pop(shape, (0.0, False))
    # Never 0.0, which is -0.0 too, nor nan, which equals nothing: numbers that are equal have the same bits.
    _seen[shape] = gradient, gradient == before != 0.0
    if len(_seen) > KEPT:
        del _seen[next(iter(_seen))]
