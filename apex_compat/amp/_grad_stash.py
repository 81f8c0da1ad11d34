"""Sets gradients aside for a backward pass, and adds them to the new ones after it."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from apex_compat.amp.scaler import LossScaler
from apex_compat.fp16_utils import gradients


def put_grads_back(params: Iterable[Tensor], earlier: dict[Tensor, Tensor]) -> None:
    """Give `params` the gradients that `take_grads` returned, and no others."""
    for param in params:
        param.grad = earlier.get(param)


def take_grads(params: Iterable[Tensor]) -> dict[Tensor, Tensor]:
    """Return the gradients of `params` by parameter, and leave the parameters without."""
    taken = {}
    for param in params:
        if param.grad is not None:
            taken[param] = param.grad
            param.grad = None
    return taken


@torch.no_grad()
def unscale_and_add(params: Sequence[Tensor], earlier: dict[Tensor, Tensor], scaler: LossScaler) -> None:
    """Unscale the gradients of `params` in place, and add `earlier` ones, which are unscaled already.

    The sum is taken in fp32 and rounded once.
    """
    gradients.coalesce(params)
    grads = {p: p.grad for p in params if p.grad is not None}
    twice = [param for param in earlier if param in grads]
    for param in twice:
        grads[param] = grads[param].to(torch.promote_types(param.dtype, torch.float32))
    scaler.unscale_(map(gradients.dense, grads.values()))
    in_place = [param for param in twice if _are_alike(grads[param], earlier[param])]
    if in_place:
        torch._foreach_add_([grads[param] for param in in_place], [earlier[param] for param in in_place])
    for param in set(twice) - set(in_place):
        param.grad = (grads[param] + earlier[param]).to(param.dtype)
    for param, grad in earlier.items():
        if param.grad is None:
            param.grad = grad


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.layout == b.layout == torch.strided
