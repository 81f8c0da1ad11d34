"""`FP16_Optimizer.step(closure)`: closures that are repeated while they overflow."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from apex_compat.fp16_utils.fp16_optimizer import FP16_Optimizer

# More halvings than lie between 2**24, where the default policy stops growing, and the smallest scale,
# 2**-100.
MAX_REPEATS = 128


class SkippedStep(Exception):  # noqa: N818  not an error: it carries a skip out of the wrapped optimizer's step
    """The first closure call of a step overflowed at a scale that stays, before any weight changed."""


class ScaledClosure:
    """The closure that the wrapped optimizer sees.

    1. Before every call but the first of a step, the masters are copied to the model.
    2. The user's closure runs. While it overflows under a dynamic scale, it is repeated with the reduced
       scale.
    3. Where the scale does not fall a repetition would end alike (it is static or the smallest, or the gradients
       were clipped and have no finite norm): the step is skipped at its first call; later, when the scale has
       fallen or the optimizer has already moved the masters, it is an error.

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
            SkippedStep, RuntimeError: see the class; RuntimeError also if it still overflows after 128 repeats.
        """
        owner = self._owner
        first = owner.first_closure_call_this_step
        owner.first_closure_call_this_step = False
        if not first:
            self._copy_to_model()
        fell = False
        for _ in range(1 + MAX_REPEATS):
            scale = owner.loss_scale_tensor
            loss = self._closure()
            owner.require_updated("step(closure)")
            if not owner.overflow:
                return loss
            if owner.loss_scale >= scale.item():
                break
            fell = True
        if first and not fell:
            raise SkippedStep
        raise RuntimeError(
            f"step(closure): the closure's gradients still overflow at loss scale {owner.loss_scale:g}; "
            "its loss is inf or nan at any scale, its gradients have no finite norm, or the static or smallest allowed "
            "loss scale is too large"
        )
