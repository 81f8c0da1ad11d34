"""Repeats a closure while its gradients overflow: the work of `FP16_Optimizer.step(closure)`."""

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

# More halvings than lie between 2**24, where the default policy stops growing, and the smallest scale,
# 2**-100.
MAX_REPEATS = 128


class Attempt(NamedTuple):
    """One call of the user's closure."""

    loss: Any
    """The closure's return value."""
    overflow: bool
    """True: a gradient is inf or nan, or the gradients have no finite norm."""
    loss_scale: Tensor
    """float32, shape (): the scale that the closure's loss was multiplied by."""
    next_scale: Tensor
    """float32, shape (): the scale of the next attempt."""


class SkippedStep(Exception):  # noqa: N818  not an error: it carries a skip out of the wrapped optimizer's step
    """The first closure call of a step overflowed at a scale that stays, before any weight changed."""


class ScaledClosure:
    """The closure that the wrapped optimizer sees during one step.

    1. It copies the masters to the model before every call but the first.
    2. It runs the user's closure. While that overflows and the scale falls, it runs the closure again.
    3. Where the scale does not fall, a repetition would end alike. The scale is then static or the smallest,
       or the gradients were clipped and have no finite norm. At the first call the step is skipped. Later it is
       an error, since the scale has fallen or the optimizer has moved the masters.

    Args:
        attempt: runs the user's closure once.
        copy_to_model: copies the masters to the model.
    """

    def __init__(self, attempt: Callable[[], Attempt], copy_to_model: Callable[[], None]) -> None:
        self._attempt = attempt
        self._copy_to_model = copy_to_model
        self._first = True

    def __call__(self) -> Any:
        """Return the user closure's loss.

        Raises:
            SkippedStep: the first call of the step overflows at a scale that stays.
            RuntimeError: a later call does, or a call overflows after 128 repeats.
        """
        first, self._first = self._first, False
        if not first:
            self._copy_to_model()
        fell = False
        for _ in range(1 + MAX_REPEATS):
            attempt = self._attempt()
            if not attempt.overflow:
                return attempt.loss
            if attempt.next_scale.item() >= attempt.loss_scale.item():
                break
            fell = True
        if first and not fell:
            raise SkippedStep
        raise RuntimeError(
            f"step(closure): the closure's gradients still overflow at loss scale {attempt.next_scale.item():g}; "
            "its loss is inf or nan at any scale, its gradients have no finite norm, or the static or smallest allowed "
            "loss scale is too large"
        )
