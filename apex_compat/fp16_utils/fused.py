"""Takes the steps of fused optimizers, which read the found-inf tensor and skip on the device."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer


def skips_on_device(optimizer: Optimizer) -> bool:
    """Return True if a tensor can tell `optimizer.step` to change nothing.

    A fused SGD with momentum and dampening cannot be told so. Its first step sets the momentum to the undampened
    gradient, and only the host knows that a skipped step was not the first.
    """
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    return not (isinstance(optimizer, SGD) and any(g["momentum"] and g["dampening"] for g in optimizer.param_groups))


def step(optimizer: Optimizer, found_inf: Tensor) -> Any:
    """Call `optimizer.step()` so that nothing changes if `found_inf` is 1.

    Args:
        optimizer: one that `skips_on_device`. Its gradients are unscaled already.
        found_inf: float32, shape (), 0. or 1. The optimizer finds it where torch.amp.GradScaler puts it.

    Returns:
        The return value of `optimizer.step()`.
    """
    optimizer.grad_scale = None  # type: ignore[attr-defined]
    optimizer.found_inf = found_inf  # type: ignore[attr-defined]
    try:
        with momentum_starts_at_zero(optimizer, found_inf):
            return optimizer.step()
    finally:
        del optimizer.grad_scale  # type: ignore[attr-defined]
        del optimizer.found_inf  # type: ignore[attr-defined]


@contextmanager
def momentum_starts_at_zero(optimizer: Optimizer, found_inf: Tensor) -> Iterator[None]:
    """Let a first step within the block that is skipped leave a momentum of 0.

    A skipped first step of fused SGD leaves the momentum as it was allocated, uninitialised.

    Args:
        optimizer: any. The host skips the step of one that is not fused, and nothing is left to do.
        found_inf: bool or float32, shape (); 1 or True where the step is skipped.
    """
    without_momentum = _params_without_momentum(optimizer)
    yield
    with torch.no_grad():
        for param in without_momentum:
            buffer = optimizer.state[param]["momentum_buffer"]
            buffer.masked_fill_(found_inf.to(buffer.device, non_blocking=True).bool(), 0.0)


def _params_without_momentum(optimizer: Optimizer) -> list[Tensor]:
    """Return the parameters to which the next step of a fused SGD optimizer will give a momentum buffer."""
    if not (isinstance(optimizer, SGD) and getattr(optimizer, "_step_supports_amp_scaling", False)):
        return []
    return [
        param
        for group in optimizer.param_groups
        if group["momentum"]
        for param in group["params"]
        if param.grad is not None and optimizer.state[param].get("momentum_buffer") is None
    ]
