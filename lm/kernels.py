"""Where torch's own kernel would be right but needlessly slow."""

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(weight: Tensor) -> torch.dtype:
    """The dtype in which a matrix product with `weight` runs here: autocast's where it is on, else its own."""
    device = weight.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def cpu_multiplies_fp16() -> bool:
    """Whether this CPU has instructions for fp16 matrix products (AVX512-FP16, AMX-FP16)."""
    return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def fp16_through_fp32(weight: Tensor) -> bool:
    """Whether products with `weight` are of fp16 operands, here and now, and this CPU has no instructions for them.

    Then they are made in fp32: exact products, fp32 sums, one rounding to fp16, which is what tensor cores do.
    """
    return compute_dtype(weight) is torch.float16 and weight.device.type == "cpu" and not cpu_multiplies_fp16()


def linear(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """`torch.nn.functional.linear`, at a usable speed for fp16 on every CPU.

    Without fp16 instructions torch multiplies fp16 matrices one element at a time: 8 s for the three decoder
    products of a default training step on a CPU with AVX-512 but no AVX512-FP16, where the way below takes
    0.3 s. There the fp16 operands are multiplied and summed in fp32 and the result is rounded to fp16 once,
    forward and backward. Everywhere else this is `F.linear` itself.

    Args:
        input: shape (..., in_features).
        weight: shape (out_features, in_features).
        bias: shape (out_features,).

    Returns:
        Shape (..., out_features), in `compute_dtype(weight)`.
    """
    if not fp16_through_fp32(weight):
        return F.linear(input, weight, bias)
    with torch.autocast("cpu", enabled=False):
        # .half() rounds fp32 operands where autocast would; each cast rounds the gradient on its way back.
        return F.linear(input.half().float(), weight.half().float(), bias.half().float()).half()
