"""The formulas of apex's optimizers over lists of tensors, by torch's foreach operations.

Every function computes in fp32 whatever dtype its tensors have, in float64 for float64 ones, and rounds once to the
dtype of each tensor that it changes. All tensors of a list may lie on different devices. No function waits for a
device. The gradients that a step takes are in fp32 or float64 already, as `widened` returns them. They are read and
left as they are.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

Tensors = tuple[Tensor, ...] | list[Tensor]
Betas = tuple[float, float]


def widened(tensors: Tensors) -> list[Tensor]:
    """Return `tensors` in fp32, a wider one as it is. A tensor that is wide enough is returned itself."""
    return [tensor.to(torch.promote_types(tensor.dtype, torch.float32)) for tensor in tensors]


@contextmanager
def _wide(*lists: Tensors) -> Iterator[list[list[Tensor]]]:
    """Give each list in fp32 or wider, and copy what was computed back to its tensors at the end of `with`."""
    wide_lists = [widened(tensors) for tensors in lists]
    yield wide_lists
    for tensors, wide in zip(lists, wide_lists, strict=True):
        narrow = [(target, source) for target, source in zip(tensors, wide, strict=True) if target is not source]
        if narrow:
            torch._foreach_copy_([target for target, _ in narrow], [source for _, source in narrow])


def grad_norm(grads: Tensors) -> Tensor:
    """Return the 2-norm over all `grads`: shape (), fp32 or wider, on the device of the first; 0 for an empty list."""
    if not grads:
        return torch.zeros(())
    norms = torch._foreach_norm(widened(grads))
    total: Tensor = torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))
    return total


def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: float,
    betas: Betas,
    eps: float,
    step: int,
    decoupled: bool,
    bias_correction: bool,
    weight_decay: float,
) -> None:
    """Take a step of Adam in place: p -= lr * ((m / c1) / (sqrt(v / c2) + eps) + weight_decay * p).

    If not `decoupled`, the decay is added to the gradient instead. c1 and c2 are 1 - beta^step, or 1 without
    `bias_correction`.
    """
    if not params:
        return
    with _wide(params, exp_avgs, exp_avg_sqs) as (p, m, v):
        g = grads if decoupled else _decayed(grads, p, weight_decay)
        updates = _adam_update(g, m, v, betas, 1 - betas[0], eps, _corrections(step, betas, bias_correction))
        if decoupled:
            updates = _decayed(updates, p, weight_decay)
        torch._foreach_add_(p, updates, alpha=-lr)


def lamb_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    *,
    lr: float,
    betas: Betas,
    eps: float,
    step: int,
    bias_correction: bool,
    weight_decay: float,
    grad_averaging: bool,
    decoupled: bool,
    norm: Tensor,
    max_norm: float,
    always_adapt: bool,
) -> None:
    """Take a step of LAMB in place: p -= ratio * u, with u as Adam's, of gradients clipped to `max_norm`.

    The ratio is lr * |p| / |u| for each tensor. It is lr where a norm is 0, and everywhere if there is neither
    weight decay nor `always_adapt`.

    Args:
        norm: the 2-norm over all gradients of the optimizer, shape ().
    """
    if not params:
        return
    with _wide(params, exp_avgs, exp_avg_sqs) as (p, m, v):
        clip = torch.where(norm > max_norm, norm / max_norm, torch.ones_like(norm))
        clips = {device: clip.to(device) for device in {grad.device for grad in grads}}
        g: Tensors = torch._foreach_div(grads, [clips[grad.device] for grad in grads])
        if not decoupled:
            g = _decayed(g, p, weight_decay)
        share = 1 - betas[0] if grad_averaging else 1.0
        updates = _adam_update(g, m, v, betas, share, eps, _corrections(step, betas, bias_correction))
        if decoupled:
            updates = _decayed(updates, p, weight_decay)
        if weight_decay == 0 and not always_adapt:
            torch._foreach_add_(p, updates, alpha=-lr)
            return
        norms = zip(torch._foreach_norm(p), torch._foreach_norm(updates), strict=True)
        ratios = [torch.where((pn > 0) & (un > 0), lr * pn / un, torch.full_like(pn, lr)) for pn, un in norms]
        torch._foreach_sub_(p, torch._foreach_mul(updates, ratios))


def sgd_(
    params: Tensors,
    grads: Tensors,
    buffers: Tensors,
    *,
    lr: float,
    momentum: float,
    dampening: float,
    weight_decay: float,
    nesterov: bool,
    wd_after_momentum: bool,
    first_run: bool,
    scale: float = 1.0,
) -> None:
    """Take a step of SGD in place, as torch.optim.SGD in every bit where it can be told the same.

    Args:
        buffers: the momentum, which is not looked at if `momentum` is 0.
        wd_after_momentum: add the decay to the step, not to the gradient.
        first_run: set the momentum to the gradient, undampened.
        scale: multiplies each gradient first.
    """
    if not params:
        return
    with _wide(params, buffers if momentum else []) as (p, b):
        d: Tensors = grads
        if scale != 1.0:
            d = torch._foreach_mul(d, scale)
        if not wd_after_momentum:
            d = _decayed(d, p, weight_decay)
        if momentum:
            if first_run:
                torch._foreach_copy_(b, d)
            else:
                torch._foreach_mul_(b, momentum)
                torch._foreach_add_(b, d, alpha=1 - dampening)
            d = torch._foreach_add(d, b, alpha=momentum) if nesterov else b
        if wd_after_momentum:
            d = _decayed(d, p, weight_decay)
        torch._foreach_add_(p, d, alpha=-lr)


def novograd_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    norms: Tensors,
    *,
    lr: float,
    betas: Betas,
    eps: float,
    step: int,
    bias_correction: bool,
    weight_decay: float,
    grad_averaging: bool,
    inside: bool,
    norm_type: float,
) -> None:
    """Take a step of NovoGrad in place, whose second moment is one norm n for each tensor.

    g' = g / (n / c2 + eps), and p -= lr * (m / c1 / (n / c2 + eps) + weight_decay * p). If `inside`, m averages
    g' + weight_decay * p, and p -= lr * m / c1. Here c1 = 1 - beta1^step and c2 = sqrt(1 - beta2^step).

    Args:
        norms: fp32, shape () each, changed in place: sqrt(beta2 n^2 + (1 - beta2) |g|^2).
        norm_type: 2, or inf for beta2 n + (1 - beta2) max |g|.
    """
    if not params:
        return
    c1, square = _corrections(step, betas, bias_correction)
    with _wide(params, exp_avgs) as (p, m):
        g: Tensors = grads
        _blend_norms_(norms, torch._foreach_norm(g, norm_type), betas[1], norm_type)
        denominators = torch._foreach_div(norms, square**0.5)
        torch._foreach_add_(denominators, eps)
        if inside:
            g = _decayed(torch._foreach_div(g, denominators), p, weight_decay)
        torch._foreach_mul_(m, betas[0])
        torch._foreach_add_(m, g, alpha=1 - betas[0] if grad_averaging else 1.0)
        updates: Tensors = torch._foreach_div(m, c1)
        if not inside:
            torch._foreach_div_(updates, denominators)
            updates = _decayed(updates, p, weight_decay)
        torch._foreach_add_(p, updates, alpha=-lr)


def adagrad_(
    params: Tensors, grads: Tensors, sums: Tensors, *, lr: float, eps: float, decoupled: bool, weight_decay: float
) -> None:
    """Take a step of Adagrad in place: h += g^2; p -= lr * g / (sqrt(h) + eps), with the decay in g.

    If `decoupled`, the decay is added to g / (sqrt(h) + eps) instead.
    """
    if not params:
        return
    with _wide(params, sums) as (p, h):
        g = grads if decoupled else _decayed(grads, p, weight_decay)
        torch._foreach_addcmul_(h, g, g)
        denominators = torch._foreach_sqrt(h)
        torch._foreach_add_(denominators, eps)
        updates: Tensors = torch._foreach_div(g, denominators)
        if decoupled:
            updates = _decayed(updates, p, weight_decay)
        torch._foreach_add_(p, updates, alpha=-lr)


def _decayed(tensors: Tensors, params: Tensors, weight_decay: float) -> Tensors:
    return torch._foreach_add(tensors, params, alpha=weight_decay) if weight_decay else tensors


def _corrections(step: int, betas: Betas, wanted: bool) -> tuple[float, float]:
    return (1 - betas[0] ** step, 1 - betas[1] ** step) if wanted else (1.0, 1.0)


def _adam_update(
    g: Tensors, m: Tensors, v: Tensors, betas: Betas, share: float, eps: float, corrections: tuple[float, float]
) -> Tensors:
    """Move the moments m and v in place, and return (m / c1) / (sqrt(v / c2) + eps)."""
    torch._foreach_mul_(m, betas[0])
    torch._foreach_add_(m, g, alpha=share)
    torch._foreach_mul_(v, betas[1])
    torch._foreach_addcmul_(v, g, g, value=1 - betas[1])
    denominators = torch._foreach_div(v, corrections[1])
    torch._foreach_sqrt_(denominators)
    torch._foreach_add_(denominators, eps)
    updates = torch._foreach_div(m, corrections[0])
    torch._foreach_div_(updates, denominators)
    return updates


def _blend_norms_(norms: Tensors, new: Tensors, beta: float, norm_type: float) -> None:
    if norm_type == 2:
        torch._foreach_mul_(norms, norms)
        torch._foreach_mul_(norms, beta)
        torch._foreach_addcmul_(norms, new, new, value=1 - beta)
        torch._foreach_sqrt_(norms)
    else:
        torch._foreach_mul_(norms, beta)
        torch._foreach_add_(norms, new, alpha=1 - beta)
