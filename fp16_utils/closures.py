"""`FP16_Optimizer.step(closure)`: closures that are repeated while they overflow."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fp16_utils.fp16_optimizer import FP16_Optimizer

# More halvings than lie between 2**24, where the default policy stops growing, and the smallest scale,
# 2**-100.
MAX_REPEATS = 128


class SkippedStep(Exception):  # noqa: N818  not an error: it carries a skip out of the wrapped optimizer's step
    """The first closure call of a step overflowed under a static scale, before any weight changed."""


class ScaledClosure:
    """The closure that the wrapped optimizer sees.

    1. Before every call but the first of a step, the masters are copied to the model.
    2. The user's closure runs. While it overflows under a dynamic scale, it is repeated with the reduced
       scale.
    3. Under a static scale a repetition would overflow again: the step is skipped at its first call; later,
       when the optimizer has already moved the masters, it is an error.

    Args:
        owner: the optimizer whose `backward` the closure calls.
        closure: as of `FP16_Optimizer.step`.
        copy_to_model: copies the masters to the model.
    """

    def __init__(self, owner: "FP16_Optimizer", closure: Callable[[], Any], copy_to_model: Callable[[], None]) -> None:
        self._owner = owner
        self._closure = closure
        self._copy_to_model = copy_to_model

    def __call__(self) -> Any:
        """Return the user closure's loss.

        Raises:
            SkippedStep: see the class.
            RuntimeError: it still overflows after 128 repeats, or overflows at a later call under a static
                scale.
        """
        owner = self._owner
        first = owner.first_closure_call_this_step
        owner.first_closure_call_this_step = False
        if not first:
            self._copy_to_model()
        for _ in range(1 + MAX_REPEATS if owner.dynamic_loss_scale else 1):
            loss = self._closure()
            owner.require_updated("step(closure)")
            if not owner.overflow:
                return loss
        if first and not owner.dynamic_loss_scale:
            raise SkippedStep
        raise RuntimeError(
            f"step(closure): the closure's gradients still overflow at loss scale {owner.loss_scale:g}; "
            "its loss is inf or nan at any scale, or the static or smallest allowed loss scale is too large"
        )
