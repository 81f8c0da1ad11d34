# ruff: noqa: N999  # apex's name
"""Has the operations of apex's extension amp_C that scripts call through multi_tensor_applier, on any device.

The first arguments of each are a chunk size, which has no use here, a flag and lists of tensors of equal length.
The flag is an integer tensor of shape (1,). `multi_tensor_scale` and `multi_tensor_axpby` set it to 1 if a number is
inf or nan, and compute all the same. The norms leave it alone. Optimizers do nothing if it is not 0; for that they
wait for the device once. All compute in fp32, whatever the tensors' dtype, or in float64.
"""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, ParamSpec

import torch
from torch import Tensor

from apex_compat.fp16_utils.gradients import by_device
from apex_compat.optimizers import formulas
from apex_compat.optimizers.formulas import Tensors, widened

Lists = Sequence[Tensors]
P = ParamSpec("P")


def _optimizer(op: Callable[P, None]) -> Callable[P, None]:
    """Make `op` do nothing where its second argument, the flag, is not 0."""

    @wraps(op)
    def checked(*args: P.args, **kwargs: P.kwargs) -> None:
        if not bool(args[1]):
            with torch.no_grad():
                op(*args, **kwargs)

    return checked


def _flag_nonfinite(noop_flag: Tensor, tensors: Sequence[Tensor]) -> None:
    """Set `noop_flag` to 1 if a number of `tensors` is inf or nan, without waiting for the device."""
    for some in by_device(tensor for tensor in tensors if tensor.numel()).values():
        # The largest magnitude is exact in every dtype, and nan if there is one.
        largest = torch.stack([norm.double() for norm in torch._foreach_norm(some, float("inf"))])
        noop_flag.masked_fill_(largest.isfinite().all().logical_not().to(noop_flag.device), 1)


@torch.no_grad()
def multi_tensor_scale(chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float) -> None:
    """Compute out = in * scale for tensor_lists [in, out]. The flag says if an input is not finite."""
    sources, targets = tensor_lists
    _flag_nonfinite(noop_flag, sources)
    if sources:
        torch._foreach_copy_(targets, torch._foreach_mul(widened(sources), scale))


@torch.no_grad()
def multi_tensor_axpby(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, a: float, b: float, arg_to_check: int = -1
) -> None:
    """Compute out = a * x + b * y for tensor_lists [x, y, out].

    The flag says if an x (arg_to_check 0), a y (1) or either of them (-1) is not finite.
    """
    x, y, out = tensor_lists
    _flag_nonfinite(noop_flag, {-1: [*x, *y], 0: x, 1: y}[arg_to_check])
    if x:
        sums = torch._foreach_add(torch._foreach_mul(widened(x), a), torch._foreach_mul(widened(y), b))
        torch._foreach_copy_(out, sums)


@torch.no_grad()
def multi_tensor_l2norm(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the 2-norm over all of tensor_lists [x], shape (1,), and that of each x, shape (n,), in fp32.

    The second one is empty unless `per_tensor`.
    """
    (tensors,) = tensor_lists
    total = formulas.grad_norm(tensors).reshape(1)
    if not per_tensor or not tensors:
        return total, total.new_empty(0)
    return total, torch.stack([norm.to(total.device) for norm in torch._foreach_norm(widened(tensors))])


multi_tensor_l2norm_mp = multi_tensor_l2norm


@torch.no_grad()
def multi_tensor_l2norm_scale(
    chunk_size: int, noop_flag: Tensor, tensor_lists: Lists, scale: float, per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    """Compute out = in * scale for tensor_lists [in, out], and return the norms of the unrounded products."""
    sources, targets = tensor_lists
    scaled: Tensors = torch._foreach_mul(widened(sources), scale) if sources else []
    if sources:
        torch._foreach_copy_(targets, scaled)
    return multi_tensor_l2norm(chunk_size, noop_flag, [scaled], per_tensor)


@_optimizer
def multi_tensor_sgd(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    wd: float,
    momentum: float,
    dampening: float,
    lr: float,
    nesterov: bool,
    first_run: bool,
    wd_after_momentum: bool,
    scale: float = 1.0,
) -> None:
    """Take a step of SGD for tensor_lists [grads, params, momenta]. A fourth list takes copies of the parameters."""
    grads, params, buffers, *copies = tensor_lists
    formulas.sgd_(
        params,
        widened(grads),
        buffers,
        lr=lr,
        momentum=momentum,
        dampening=dampening,
        weight_decay=wd,
        nesterov=nesterov,
        wd_after_momentum=wd_after_momentum,
        first_run=first_run,
        scale=scale,
    )
    for targets in copies:
        torch._foreach_copy_(targets, params)


@_optimizer
def multi_tensor_adam(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Take a step of Adam for tensor_lists [grads, params, exp_avgs, exp_avg_sqs]. Mode 1 decouples the decay."""
    grads, params, exp_avgs, exp_avg_sqs = tensor_lists
    formulas.adam_(
        params,
        widened(grads),
        exp_avgs,
        exp_avg_sqs,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        step=step,
        decoupled=bool(mode),
        bias_correction=bool(bias_correction),
        weight_decay=weight_decay,
    )


@_optimizer
def multi_tensor_lamb(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    mode: int,
    global_grad_norm: Tensor,
    max_grad_norm: float,
    use_nvlamb: bool = False,
) -> None:
    """Take a step of LAMB for tensor_lists [grads, params, exp_avgs, exp_avg_sqs]. Mode 1 decouples the decay.

    Args:
        global_grad_norm: the norm that is compared with `max_grad_norm`, shape () or (1,).
    """
    grads, params, exp_avgs, exp_avg_sqs = tensor_lists
    formulas.lamb_(
        params,
        widened(grads),
        exp_avgs,
        exp_avg_sqs,
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        step=step,
        bias_correction=bool(bias_correction),
        weight_decay=weight_decay,
        grad_averaging=bool(grad_averaging),
        decoupled=bool(mode),
        norm=global_grad_norm.reshape(()),
        max_norm=max_grad_norm,
        always_adapt=use_nvlamb,
    )


@_optimizer
def multi_tensor_novograd(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    norms: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    step: int,
    bias_correction: int,
    weight_decay: float,
    grad_averaging: int,
    moment_mode: int,
    norm_type: int,
) -> None:
    """Take a step of NovoGrad for tensor_lists [grads, params, exp_avgs]. Mode 0 has the decay inside the moment.

    Args:
        norms: fp32, shape (n,), changed in place.
        norm_type: 2; 0 is the largest magnitude.
    """
    grads, params, exp_avgs = tensor_lists
    formulas.novograd_(
        params,
        widened(grads),
        exp_avgs,
        norms.unbind(),
        lr=lr,
        betas=(beta1, beta2),
        eps=eps,
        step=step,
        bias_correction=bool(bias_correction),
        weight_decay=weight_decay,
        grad_averaging=bool(grad_averaging),
        inside=not moment_mode,
        norm_type=norm_type or float("inf"),
    )


@_optimizer
def multi_tensor_adagrad(
    chunk_size: int,
    noop_flag: Tensor,
    tensor_lists: Lists,
    lr: float,
    epsilon: float,
    mode: int,
    weight_decay: float,
) -> None:
    """Take a step of Adagrad for tensor_lists [grads, params, sums]. Mode 1 decouples the decay."""
    grads, params, sums = tensor_lists
    formulas.adagrad_(params, widened(grads), sums, lr=lr, eps=epsilon, decoupled=bool(mode), weight_decay=weight_decay)


def __getattr__(name: str) -> Any:
    offered = ", ".join(sorted(known for known in globals() if known.startswith("multi_tensor")))
    raise AttributeError(f"amp_C.{name} is not offered; these are: {offered}")
