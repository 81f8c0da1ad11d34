"""Keeps scaled half gradients for FusedSGD with materialize_master_grads=False, which steps from them."""

from typing import Any

import torch

from apex_compat.amp.scaler import LossScaler
from apex_compat.fp16_utils import gradients


def keeps_half_grads(optimizer: Any) -> bool:
    """Return True if `optimizer` takes the gradients of the half parameters, scaled as they are."""
    return not getattr(optimizer, "materialize_master_grads", True)


def post_half_grads(self: Any, scaler: LossScaler) -> None:
    """Bring new and earlier gradients to the smaller of their two scales, and leave them in the model.

    The smaller, since at the larger a sum could leave float16. The optimizer finds it in `most_recent_scale`.
    """
    stash = self._amp_stash
    new_scale, earlier_scale = scaler.loss_scale(), self.most_recent_scale
    scale = min(new_scale, earlier_scale) if self.scale_set_by_backward else new_scale
    params = (*stash.all_fp16_params, *stash.all_fp32_from_fp32_params)
    totals = {param: param.grad.float() for param in params if param.grad is not None}
    scaler.multiply_(map(gradients.dense, totals.values()), torch.tensor(scale / new_scale))
    for param, grad in stash.earlier_grads.items():
        earlier = grad.float() * (scale / earlier_scale)
        totals[param] = totals[param] + earlier if param in totals else earlier
    for param, total in totals.items():
        param.grad = total.to(param.dtype)
    stash.earlier_grads = {}
    self.most_recent_scale, self.scale_set_by_backward = scale, True


def forget_scale(optimizer: Any) -> None:
    """Tell `optimizer` that it has no scaled gradients, if it is one that is told."""
    if hasattr(optimizer, "most_recent_scale"):
        optimizer.most_recent_scale, optimizer.scale_set_by_backward = 1.0, False
