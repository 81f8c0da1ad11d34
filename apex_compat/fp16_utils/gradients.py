"""Works on lists of gradients with foreach primitives, and does not wait for the device."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def dense(grad: Tensor) -> Tensor:
    """Return `grad` itself if it is strided, or the values of a sparse one; of complex ones a real view."""
    values = grad if grad.layout == torch.strided else grad._values()
    return torch.view_as_real(values) if values.is_complex() else values


def by_device(tensors: Iterable[Tensor]) -> dict[torch.device, list[Tensor]]:
    """Sort `tensors` into lists that one foreach call can take, keeping their order."""
    lists: defaultdict[torch.device, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        lists[tensor.device].append(tensor)
    return lists


def copy_to_masters(params: Sequence[Tensor], masters: Sequence[Tensor]) -> None:
    """Give each fp32 master the gradient of its half-precision parameter.

    A parameter without a gradient leaves its master without one. A sparse gradient stays sparse. Its repeated
    indices are summed in fp32, since in half precision the sum could overflow.
    """
    sources, targets = [], []
    for param, master in zip(params, masters, strict=True):
        if param.grad is None:
            master.grad = None
        elif param.grad.layout != torch.strided:
            master.grad = param.grad.float().coalesce()
        else:
            if master.grad is None or master.grad.layout != torch.strided:
                master.grad = torch.empty_like(master)
            sources.append(param.grad)
            targets.append(master.grad)
    if sources:
        torch._foreach_copy_(targets, sources)


def copy_values(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copy `sources` into `targets` of the same shapes, each cast to its target's dtype."""
    if targets:
        torch._foreach_copy_(list(targets), list(sources))


def coalesce(params: Iterable[Tensor]) -> None:
    """Sum repeated indices of sparse gradients in place, so that the sums are checked that will be applied."""
    for param in params:
        if param.grad is not None and param.grad.layout != torch.strided:
            param.grad = param.grad.coalesce()


def unscale_(grads: Sequence[Tensor], inv_scale: Tensor, found_inf: Tensor, narrow: bool) -> Tensor:
    """Multiply fp32 `grads` by `inv_scale` in place and return whether one was or became inf or nan.

    The primitive checks a value before it multiplies it. That is enough for gradients that came from float16:
    no finite one leaves float32 at any allowed scale. Others can when the scale is below 1, so they are checked
    once more afterwards.

    Args:
        grads: strided fp32 tensors, on any devices.
        inv_scale: float32, shape ().
        found_inf: float32, shape (), 0. or 1.: the result for other gradients.
        narrow: True if all `grads` were rounded to float16.

    Returns:
        float32, shape (), on the device of `found_inf`: 1. if `found_inf` is or a gradient is not finite, else 0.
    """
    for device, tensors in by_device(grads).items():
        found = torch.zeros((), dtype=torch.float32, device=device)
        factor = inv_scale.to(device, non_blocking=True)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, factor)
        if not narrow:
            torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, torch.ones_like(factor))
        found_inf = torch.maximum(found_inf, found.to(found_inf.device, non_blocking=True))
    return found_inf


def multiply_(grads: Sequence[Tensor], factor: Tensor) -> None:
    """Multiply fp32 `grads` by `factor` (float32, shape ()) in place."""
    for device, tensors in by_device(grads).items():
        torch._foreach_mul_(tensors, factor.to(device, non_blocking=True))


def rescale_(grads: Iterable[Tensor], old_scale: Tensor, new_scale: Tensor) -> None:
    """Turn gradients times `old_scale` into gradients times `new_scale` in place (scales: float32, shape ())."""
    ratio = new_scale / old_scale
    for grad in grads:
        # In fp32: as a float16 the ratio itself could overflow.
        grad.copy_(grad.float() * ratio.to(grad.device, non_blocking=True))


def reciprocal(scale: Tensor) -> Tensor:
    """Return 1 / scale: float32, shape (). It is taken in float64 and rounded, as torch.amp.GradScaler does.

    MPS has no float64. There it is taken in float32, also as GradScaler does.
    """
    return scale.reciprocal() if scale.device.type == "mps" else scale.double().reciprocal().float()


def total_norm(grads: Sequence[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """Return the norm over all `grads` in their order: float32, shape (), on `device`.

    Args:
        grads: strided tensors; the values of a sparse gradient.
        norm_type: the order of the norm; inf is the largest magnitude.
        device: where the norm goes.
    """
    return torch.nn.utils.get_total_norm(grads, norm_type).to(device, non_blocking=True)


def clip_(grads: Sequence[Tensor], max_norm: float, norm: Tensor, found_inf: Tensor) -> None:
    """Clip `grads` of the total `norm` in place, as torch.nn.utils.clip_grad_norm_ does, to the last bit.

    Where `found_inf` (float32, shape ()) is 1 they stay as they are. A norm of nan would make all of them nan
    and hide which one overflowed.
    """
    factor = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    multiply_(grads, factor.masked_fill(found_inf.bool(), 1.0))


def any_nonfinite(grads: Sequence[Tensor]) -> bool:
    """Return True if strided `grads` of any dtype hold an inf or nan. This waits once for each device."""
    return any(
        # The largest magnitude is exact in every dtype, and nan if there is one; a sum could overflow.
        not bool(torch.stack([norm.float() for norm in torch._foreach_norm(tensors, float("inf"))]).isfinite().all())
        for tensors in by_device(grads).values()
    )
