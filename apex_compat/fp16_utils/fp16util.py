"""Has the helpers for mixed precision by hand: masters that the caller keeps, networks in half precision."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_ as clip_grad_norm

from apex_compat.fp16_utils import gradients
from apex_compat.fp16_utils.checks import check_dtypes

__all__ = [
    "BN_convert_float",
    "FP16Model",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]


def prep_param_lists(model: nn.Module, flat_master: bool = False) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the model's trainable parameters, and fp32 masters of them for an optimizer.

        model_params, master_params = prep_param_lists(model)
        optimizer = torch.optim.SGD(master_params, lr)
        # each step
        model.zero_grad()
        (loss.float() * loss_scale).backward()
        model_grads_to_master_grads(model_params, master_params)
        for master in master_params:
            master.grad.mul_(1 / loss_scale)
        clip_grad_norm(master_params, max_norm)
        optimizer.step()
        master_params_to_model_params(model_params, master_params)

    Args:
        model: its trainable parameters are float16, bfloat16 or float32. A tied parameter counts once.
        flat_master: True keeps all masters in one tensor, so that an optimizer has one to update.

    Returns:
        The parameters of `model` that require grad, in order, and a list of masters. Each master has the shape
        of its parameter. With `flat_master` the list has one master of shape (n,), which holds all of them one
        after the other.

    Raises:
        TypeError: a parameter has another dtype.
        ValueError: no parameter requires grad.
    """
    model_params = [param for param in model.parameters() if param.requires_grad]
    if not model_params:
        raise ValueError("model has no parameter that requires grad; it must have at least one")
    check_dtypes("model", model_params)
    # copy=True: the master of an fp32 parameter must not share its memory.
    copies = [param.detach().to(torch.float32, copy=True) for param in model_params]
    if flat_master:
        copies = [torch.cat([copy.reshape(-1) for copy in copies])]
    return model_params, [nn.Parameter(copy) for copy in copies]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy the gradients of `model_params`, cast to fp32, to those of `master_params`.

    A parameter without a gradient leaves its master without one. In a flat master its part of the gradient is 0.
    If no parameter has a gradient, the flat master has none. Sparse gradients stay sparse.

    Args:
        model_params: as `prep_param_lists` returned them.
        master_params: likewise.
        flat_master: as it was given to `prep_param_lists`.

    Raises:
        ValueError: the two lists do not belong together.
        TypeError: a gradient is sparse and the master is flat.
    """
    parts = _master_parts(model_params, master_params, flat_master)
    if not flat_master:
        gradients.copy_to_masters(model_params, master_params)
        return
    flat = master_params[0]
    grads = [param.grad for param in model_params]
    if any(grad is not None and grad.layout != torch.strided for grad in grads):
        raise TypeError("model_params has a sparse gradient; a flat master takes dense ones only (flat_master=False)")
    if all(grad is None for grad in grads):
        flat.grad = None
        return
    if flat.grad is None:
        flat.grad = torch.empty_like(flat)
    offset = 0
    for grad, part in zip(grads, parts, strict=True):
        target = flat.grad[offset : offset + part.numel()]
        if grad is None:
            target.zero_()
        else:
            target.copy_(grad.reshape(-1))
        offset += part.numel()


@torch.no_grad()
def master_params_to_model_params(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy `master_params` to `model_params`, rounded to their dtype.

    Args:
        model_params: as `prep_param_lists` returned them.
        master_params: likewise.
        flat_master: as it was given to `prep_param_lists`.

    Raises:
        ValueError: the two lists do not belong together.
    """
    gradients.copy_values(model_params, _master_parts(model_params, master_params, flat_master))


def _master_parts(model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool) -> list[Tensor]:
    """Return the master, or the part of the flat master, of each of `model_params`, in its shape."""
    if flat_master:
        sizes = [param.numel() for param in model_params]
        if len(master_params) != 1 or master_params[0].shape != (sum(sizes),):
            shapes = [tuple(master.shape) for master in master_params]
            raise ValueError(f"master_params has the shapes {shapes}; a flat master has [({sum(sizes)},)]")
        pieces = torch.split(master_params[0].detach(), sizes)
        return [piece.view(param.shape) for piece, param in zip(pieces, model_params, strict=True)]
    got, expected = ([tuple(p.shape) for p in params] for params in (master_params, model_params))
    if got != expected:
        raise ValueError(f"master_params has the shapes {got}; they must be those of model_params, {expected}")
    return list(master_params)


def to_python_float(t: Any) -> Any:
    """Return the number in a tensor of one element, or the first element of anything without `item()`."""
    return t.item() if hasattr(t, "item") else t[0]


class tofp16(nn.Module):  # noqa: N801  the name that apex.fp16_utils gave it
    """A module that casts its input to float16."""

    def forward(self, input: Tensor) -> Tensor:
        """Return `input` as float16."""
        return input.half()


def _is_affine_batch_norm(module: nn.Module) -> bool:
    return isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine


def BN_convert_float(module: nn.Module) -> nn.Module:  # noqa: N802  the name that apex.fp16_utils gave it
    """Convert the affine batch norms in `module` to float32 in place, and return it.

    Their statistics are sums over a batch, which half precision holds badly. They still take half-precision
    input.
    """
    for child in module.modules():
        if _is_affine_batch_norm(child):
            child.float()
    return module


def network_to_half(network: nn.Module) -> nn.Module:
    """Convert `network` to float16 in place, but for affine batch norms, and return it behind a `tofp16`."""
    return nn.Sequential(tofp16(), BN_convert_float(network.half()))


def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the floating point parameters and buffers of `module` to `dtype` in place, but not its children's.

    Gradients are cast with their parameters.
    """
    own: Iterable[Tensor | None] = (*module._parameters.values(), *module._buffers.values())
    for tensor in own:
        if tensor is None or not tensor.is_floating_point():
            continue
        # The gradient goes first: torch refuses one of another dtype than its parameter's.
        grad, tensor.grad = tensor.grad, None
        tensor.data = tensor.data.to(dtype)
        if grad is not None:
            tensor.grad = grad.to(dtype)


def convert_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast `network` to `dtype` in place, but for its affine batch norms, and return it.

    Raises:
        TypeError: `dtype` is not a floating point dtype.
    """
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(f"dtype is {dtype!r}; it must be a floating point dtype such as torch.float16")
    for module in network.modules():
        if _is_affine_batch_norm(module):
            continue
        convert_module(module, dtype)
        if isinstance(module, nn.RNNBase):
            module.flatten_parameters()
    return network


class FP16Model(nn.Module):
    """A network in float16, but for its affine batch norms, that casts its inputs (see `forward`).

    Args:
        network: converted in place.

    Attributes:
        network: the converted network.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = convert_network(network, dtype=torch.float16)

    def forward(self, *inputs: Tensor) -> Any:
        """Return the network's output for `inputs`, which are cast to float16.

        Indices (int32, int64) and masks (bool) stay as they are.
        """
        return self.network(*(t if t.dtype in (torch.int32, torch.int64, torch.bool) else t.half() for t in inputs))
