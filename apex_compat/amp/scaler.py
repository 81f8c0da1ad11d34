"""Holds the loss scale of one loss."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from apex_compat.amp._amp_state import maybe_print
from apex_compat.amp.utils import casts_disabled
from apex_compat.fp16_utils import gradients
from apex_compat.fp16_utils.checks import LARGEST_SCALE
from apex_compat.fp16_utils.policy import DynamicScale, StaticScale


class LossScaler:
    """The loss scale of one loss: static, or dynamic by the policy of `apex_compat.fp16_utils`.

    A dynamic scale starts at min(max_loss_scale, init_scale). It is halved on overflow, and doubled after 2000
    updates in a row without one.

    A static scale never moves. As in apex, a gradient of inf or nan under it is applied. This is printed once.
    With `check_overflow` the step is skipped.

    The scale lives on the host. Whether an update skips must be known there before the step.

    Args:
        loss_scale: "dynamic" or a number.
        init_scale: the first dynamic scale. It may lie below `min_loss_scale`, as in apex.
        scale_factor: what a dynamic scale is multiplied or divided by.
        scale_window: the updates in a row without overflow after which it grows.
        min_loss_scale: None or 0 stand for 2**-100. From 0 the scale could never come back.
        max_loss_scale: bounds a dynamic scale from above. 2**127 bounds it too.

    Attributes:
        dynamic: True if the scale follows the overflows.
        check_overflow: True skips overflows of a static scale too.
    """

    def __init__(
        self,
        loss_scale: float | str,
        init_scale: float = 2.0**16,
        scale_factor: float = 2.0,
        scale_window: int = 2000,
        min_loss_scale: float | None = None,
        max_loss_scale: float = 2.0**24,
    ) -> None:
        cpu = torch.device("cpu")
        self.check_overflow = False
        self._policy: StaticScale | DynamicScale
        if loss_scale == "dynamic":
            start, largest = min(max_loss_scale, init_scale), min(max_loss_scale, LARGEST_SCALE)
            self._policy = DynamicScale(cpu, start, scale_factor, scale_window, min_loss_scale or None, largest)
            self._policy.set(start)
        else:
            self._policy = StaticScale(float(loss_scale), cpu)
            self._static_scale = float(loss_scale)
        self.dynamic = self._policy.dynamic
        self._static_updates = 0
        self._reported = False
        self.clear_overflow_state()

    def loss_scale(self) -> float:
        """Return the factor for the next loss."""
        return self._loss_scale

    @property
    def _loss_scale(self) -> float:
        # float32 has no 0.1. A static scale is saved as it was given.
        return self._policy.scale.item() if isinstance(self._policy, DynamicScale) else self._static_scale

    @_loss_scale.setter
    def _loss_scale(self, value: float) -> None:
        self._static_scale = float(value)
        self._policy.set(self._static_scale)

    @property
    def _unskipped(self) -> int:
        """Return the updates since the scale moved, or all updates of a static scale."""
        return int(self._policy.good_updates) if isinstance(self._policy, DynamicScale) else self._static_updates

    @_unskipped.setter
    def _unskipped(self, value: int) -> None:
        if isinstance(self._policy, DynamicScale):
            self._policy.good_updates.fill_(value)
        self._static_updates = value

    def clear_overflow_state(self) -> None:
        """Forget what earlier calls of `unscale_` found."""
        self._has_overflow = False
        # One number, not 0 after an overflow. Scripts that reduce gradients themselves put their own here.
        self._overflow_buf = torch.zeros(())

    @casts_disabled()  # O1 would round the reciprocal twice
    def unscale_(self, grads: Iterable[Tensor]) -> None:
        """Divide gradients by the scale, as `multiply_` does."""
        self.multiply_(grads, gradients.reciprocal(self._policy.scale))

    @torch.no_grad()
    def multiply_(self, grads: Iterable[Tensor], factor: Tensor) -> None:
        """Multiply strided gradients by `factor` in place, and remember if one was or became inf or nan.

        This does not wait for the device.

        Args:
            grads: of any dtypes.
            factor: float32, shape ().
        """
        by_dtype: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
        for grad in grads:
            by_dtype[grad.dtype].append(grad)
        for tensors in by_dtype.values():
            found = self._overflow_buf.to(tensors[0].device, torch.float32, non_blocking=True).reshape(())
            # A product can leave its dtype only where the factor is above 1.
            self._overflow_buf = gradients.unscale_(tensors, factor, found, narrow=factor.item() <= 1)

    @casts_disabled()
    def update_scale(self) -> bool:
        """Move the scale as the class describes, once for all calls of `unscale_` since `clear_overflow_state`.

        Returns:
            True if the step must be skipped.
        """
        skips = self.dynamic or self.check_overflow
        if skips or not self._reported:
            self._has_overflow = self._has_overflow or bool(self._overflow_buf.item())  # waits for the device
        if self._has_overflow and not skips and not self._reported:
            self._reported = True
            maybe_print(
                f"Gradient overflow under the static loss scale {self.loss_scale()}: the step is applied with inf or "
                "nan, as apex did. Pass check_overflow=True to amp.initialize to skip such steps."
            )
        self._policy.update(torch.tensor(float(self._has_overflow)))
        self._static_updates += 1
        return self._has_overflow and skips
