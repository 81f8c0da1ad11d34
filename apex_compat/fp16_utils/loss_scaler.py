"""Holds the loss scalers for loops that unscale by hand.

`FP16_Optimizer` does not use them; `apex_compat.fp16_utils.policy` has its own.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from apex_compat.fp16_utils import gradients
from apex_compat.fp16_utils.checks import checked_count, checked_factor, checked_loss, checked_scale


class LossScaler:
    """A loss scale that stays as it is.

    Args:
        scale: from 2**-100 to 2**127.

    Attributes:
        cur_scale: the scale, a float.
    """

    def __init__(self, scale: float = 1) -> None:
        self.cur_scale = checked_scale("scale", scale)

    @property
    def loss_scale(self) -> float:
        """Return the factor by which `backward` multiplies the loss."""
        return self.cur_scale

    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Return False. A static scale does not look."""
        return False

    def update_scale(self, overflow: bool) -> None:
        """Do nothing. A static scale does not react to overflow."""

    def scale_gradient(self, module: nn.Module, grad_in: Any, grad_out: Any) -> tuple[Tensor | None, ...]:
        """Return `grad_in` times the scale, None where it is None. It is a hook for register_full_backward_hook."""
        return tuple(None if grad is None else grad * self.loss_scale for grad in grad_in)

    def backward(self, loss: Tensor, retain_graph: bool = False) -> None:
        """Backpropagate `loss`, cast to float32, times the scale.

        Raises:
            TypeError: `loss` is not a tensor.
            ValueError: `loss` is not one floating point number that requires grad.
        """
        torch.autograd.backward(checked_loss(loss).float() * self.loss_scale, retain_graph=retain_graph)


class DynamicLossScaler(LossScaler):
    """A loss scale that shrinks on overflow and grows when there was none for a while.

        scaler = DynamicLossScaler()
        # each step
        scaler.backward(loss)
        overflow = scaler.has_overflow(model.parameters())
        if not overflow:
            ...  # unscale by 1 / scaler.loss_scale, step
        scaler.update_scale(overflow)

    Each update has a number, the first 0:

    1. On overflow, scale = max(scale / scale_factor, 1), and this update is the last overflow.
    2. Otherwise the updates since the last overflow, or the start, are counted. At each multiple of
       `scale_window`, scale = min(scale * scale_factor, 2**127).

    Args:
        init_scale: the first scale, from 2**-100 to 2**127.
        scale_factor: greater than 1.
        scale_window: a positive int, in updates.

    Attributes:
        cur_scale: the scale, a float.
        cur_iter: the number of the next update.
        last_overflow_iter: the number of the last update with an overflow; -1 if there was none.
    """

    def __init__(self, init_scale: float = 2**32, scale_factor: float = 2.0, scale_window: int = 1000) -> None:
        self.cur_scale = checked_scale("init_scale", init_scale)
        self.scale_factor = checked_factor("scale_factor", scale_factor)
        self.scale_window = checked_count("scale_window", scale_window, smallest=1)
        self.cur_iter = 0
        self.last_overflow_iter = -1

    @torch.no_grad()
    def has_overflow(self, params: Iterable[Tensor]) -> bool:
        """Return True if a gradient of `params` holds an inf or nan. This waits once for each device."""
        grads = [gradients.dense(param.grad) for param in params if param.grad is not None]
        return gradients.any_nonfinite(grads)

    def update_scale(self, overflow: bool) -> None:
        """Move the scale as the class describes."""
        if overflow:
            self.cur_scale = max(self.cur_scale / self.scale_factor, 1.0)
            self.last_overflow_iter = self.cur_iter
        elif (self.cur_iter - self.last_overflow_iter) % self.scale_window == 0:
            self.cur_scale = min(self.cur_scale * self.scale_factor, 2.0**127)
        self.cur_iter += 1
