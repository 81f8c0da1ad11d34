"""Turns many tensors into one, so that one call communicates all of them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from apex_compat.fp16_utils.gradients import copy_values

_FLOATS = (torch.float16, torch.float32, torch.float64, torch.bfloat16)


def flatten(tensors: Sequence[Tensor]) -> Tensor:
    """Return the elements of dense `tensors` one after the other, as a copy: shape (n,).

    Args:
        tensors: one at least, all of one dtype and device.
    """
    return torch.cat([tensor.reshape(-1) for tensor in tensors])


def unflatten(flat: Tensor, tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return the parts of `flat`, shape (n,), as views in the shapes of `tensors`."""
    parts = torch.split(flat, [tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]


def sendable(flat: Tensor) -> Tensor:
    """Return `flat` in a dtype that its backend can communicate: float32 for bfloat16 through gloo.

    float32 holds every bfloat16. The gloo of older versions of torch knows no bfloat16.
    """
    if flat.dtype == torch.bfloat16 and (flat.device.type == "cpu" or dist.get_backend() == "gloo"):
        return flat.float()
    return flat


def split_by_type(tensors: Iterable[Tensor]) -> dict[str, list[Tensor]]:
    """Sort `tensors` by `tensor.type()`, which names dtype and kind of device, in the order of first appearance."""
    lists: dict[str, list[Tensor]] = {}
    for tensor in tensors:
        lists.setdefault(tensor.type(), []).append(tensor)
    return lists


def split_half_float_double(tensors: Iterable[Tensor]) -> list[list[Tensor]]:
    """Sort `tensors` into one list each for float16, float32, float64 and bfloat16, without empty lists.

    Tensors of other dtypes are left out.
    """
    tensors = list(tensors)
    lists = ([tensor for tensor in tensors if tensor.dtype == dtype] for dtype in _FLOATS)
    return [chosen for chosen in lists if chosen]


def extract_tensors(maybe_tensor: Any, tensor_list: list[Tensor]) -> None:
    """Append the tensors in `maybe_tensor`, a tensor or nested mappings, lists, tuples and sets, to `tensor_list`."""
    if isinstance(maybe_tensor, Tensor):
        tensor_list.append(maybe_tensor)
    elif isinstance(maybe_tensor, Mapping):
        extract_tensors(list(maybe_tensor.values()), tensor_list)
    elif isinstance(maybe_tensor, list | tuple | set):
        for item in maybe_tensor:
            extract_tensors(item, tensor_list)


@torch.no_grad()
def apply_flat_dist_call(bucket: Sequence[Tensor], call: Callable[..., Any], extra_args: Any = None) -> None:
    """Replace `bucket`, tensors of one type, by what `call` leaves in the flat tensor of their values.

    Args:
        bucket: changed in place.
        call: a collective that works in place, such as `torch.distributed.broadcast`. What
            `torch.distributed.all_reduce` has summed is divided by the number of processes.
        extra_args: the arguments of `call` after the tensor, a tuple.
    """
    flat = sendable(flatten(bucket))
    call(flat, *(extra_args or ()))
    if call is dist.all_reduce:
        flat /= dist.get_world_size()
    copy_values(bucket, unflatten(flat, bucket))


def flat_dist_call(tensors: Iterable[Tensor], call: Callable[..., Any], extra_args: Any = None) -> None:
    """Call `apply_flat_dist_call` once for each type in `tensors`."""
    for bucket in split_by_type(tensors).values():
        apply_flat_dist_call(bucket, call, extra_args)
