"""Replacements for kernels of torch that would be right but needlessly slow on some CPUs."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from apex_compat.amp import disable_casts
from apex_compat.amp.utils import half_of_casts


def compute_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which a matrix product with `weight` runs here: autocast's or O1's if on, else its own."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return half_of_casts(device) or weight.dtype


@contextmanager
def without_autocast(weight: Tensor) -> Iterator[None]:
    """Let products with `weight` run in the dtype of their operands: without torch.autocast and apex's O1."""
    device = weight.device.type
    autocast: Any = torch.autocast(device, enabled=False) if torch.amp.is_autocast_available(device) else nullcontext()
    with autocast, disable_casts():
        yield


def uncast(function: Any) -> Any:
    """Decorate a method of an autograd function, whose operands have their dtypes: O1 of apex casts nothing in it."""

    @wraps(function)
    def wrapper(*args: Any) -> Any:
        with disable_casts():
            return function(*args)

    return wrapper


def cpu_multiplies(half: torch.dtype) -> bool:
    """Return whether torch has usable matrix products in `half` for this CPU.

    float16 needs AVX512-FP16 or AMX-FP16. bfloat16 needs AVX-512, which can put together what AVX512-BF16 would do.
    """
    if half is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def half_through_fp32(weight: Tensor) -> bool:
    """Return whether products with `weight` have half operands here, for which this CPU has no instructions.

    Then they are made in fp32: exact products, fp32 sums, one rounding to half, which is what tensor cores do.
    """
    dtype = compute_dtype(weight)
    return dtype.itemsize == 2 and weight.device.type == "cpu" and not cpu_multiplies(dtype)


def rounded(x: Tensor, half: torch.dtype) -> Tensor:
    """Return `x` in fp32 with each number rounded to `half`. The backward pass rounds its gradient alike."""
    return x.to(half).float()


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Compute `torch.nn.functional.linear` at a usable speed for fp16 and bf16 on every CPU.

    Without instructions for them torch multiplies half matrices one element at a time: 8 s for the three decoder
    products of a default training step in fp16 on a CPU with AVX-512 but no AVX512-FP16, 10 s in bf16 on one without
    AVX-512, where the way below takes 0.3 s. There the half operands are multiplied and summed in fp32 and the result
    is rounded to half once, forward and backward. Everywhere else this is `F.linear` itself.

    Args:
        input: shape (..., in_features).
        weight: shape (out_features, in_features).
        bias: shape (out_features,).

    Returns:
        Shape (..., out_features), in `compute_dtype(weight)`.
    """
    if not half_through_fp32(weight):
        return F.linear(input, weight, bias)
    half = compute_dtype(weight)
    with without_autocast(weight):
        # Rounds fp32 operands where autocast would.
        return F.linear(rounded(input, half), rounded(weight, half), rounded(bias, half)).to(half)
