"""Layer norm and RMS norm with statistics in fp32, as modules and functions.

Input, weight and bias may have any floating dtypes. The Fused ones return the input's dtype, the Mixed ones the
weight's. `memory_efficient` saves memory in apex's backward pass; here it changes nothing. The functions have an eps
of 1e-6, the modules one of 1e-5, as in apex.
"""

import warnings
from collections.abc import Iterable, Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Shape = int | Sequence[int]


def _shape(normalized_shape: Shape) -> list[int]:
    # An integer of NumPy's is no int.
    return list(normalized_shape) if isinstance(normalized_shape, Iterable) else [int(normalized_shape)]


def _layer_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, normalized_shape: Shape, eps: float, dtype: torch.dtype
) -> Tensor:
    given = {tensor.dtype for tensor in (input, weight, bias) if tensor is not None}
    if given != {dtype}:
        # torch's own takes few mixtures. It has fp32 statistics for half inputs too, so like dtypes need no copies.
        wide = reduce(torch.promote_types, given, torch.float32)
        input = input.to(wide)
        weight = None if weight is None else weight.to(wide)
        bias = None if bias is None else bias.to(wide)
    return F.layer_norm(input, _shape(normalized_shape), weight, bias, eps).to(dtype)


def manual_rms_norm(input: Tensor, normalized_shape: Shape, weight: Tensor | None, eps: float) -> Tensor:
    """Return weight * (input / sqrt(mean(input^2) + eps)), the mean over the last dimensions in fp32.

    Args:
        input: floating, shape (..., *normalized_shape).
        normalized_shape: the last dimensions.
        weight: shape `normalized_shape`, or None. To a half-precision one the quotient is rounded first, as in apex.
        eps: added to the mean.

    Returns:
        The shape of `input`. The dtype is that of the product; without weight fp32, or float64 for such an input.
    """
    wide = input.to(torch.promote_types(input.dtype, torch.float32))
    normed = F.rms_norm(wide, _shape(normalized_shape), eps=eps)
    if weight is None:
        return normed
    if weight.dtype.itemsize < 4:
        normed = normed.to(weight.dtype)
    return weight * normed


def fused_layer_norm(
    input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """Return the layer norm of `input` over its last dimensions `normalized_shape`, in the dtype of `input`."""
    return _layer_norm(input, None, None, normalized_shape, eps, input.dtype)


def fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Return weight * fused_layer_norm(input) + bias, in the dtype of `input`. The sum is rounded once."""
    return _layer_norm(input, weight, bias, normalized_shape, eps, input.dtype)


def mixed_dtype_fused_layer_norm_affine(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalized_shape: Shape,
    eps: float = 1e-6,
    memory_efficient: bool = False,
) -> Tensor:
    """Return weight * fused_layer_norm(input) + bias, in the dtype of `weight`. The sum is rounded once."""
    return _layer_norm(input, weight, bias, normalized_shape, eps, weight.dtype)


def fused_rms_norm(input: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False) -> Tensor:
    """Return input / sqrt(mean(input^2) + eps) over the last dimensions, in the dtype of `input`."""
    return manual_rms_norm(input, normalized_shape, None, eps).to(input.dtype)


def fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """Return `manual_rms_norm` in the dtype of `input`."""
    return manual_rms_norm(input, normalized_shape, weight, eps).to(input.dtype)


def mixed_dtype_fused_rms_norm_affine(
    input: Tensor, weight: Tensor, normalized_shape: Shape, eps: float = 1e-6, memory_efficient: bool = False
) -> Tensor:
    """Return `manual_rms_norm` in the dtype of `weight`."""
    return manual_rms_norm(input, normalized_shape, weight, eps).to(weight.dtype)


class _Norm(nn.Module):
    """Holds parameters of shape `normalized_shape`, the weight ones and the bias zeros at first."""

    names: tuple[str, ...] = ("weight",)
    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        memory_efficient: bool = False,
    ) -> None:
        super().__init__()
        self.normalized_shape = shape = torch.Size(_shape(normalized_shape))
        self.eps = eps
        self.elementwise_affine = elementwise_affine
        self.memory_efficient = memory_efficient
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.empty(shape)) if elementwise_affine else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weight to 1 and the bias to 0."""
        for name, parameter in self.named_parameters(recurse=False):
            nn.init.constant_(parameter, float(name == "weight"))

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"{tuple(self.normalized_shape)}, eps={self.eps}, elementwise_affine={self.elementwise_affine}"

    def _dtype(self, input: Tensor) -> torch.dtype:
        return input.dtype


class FusedLayerNorm(_Norm):
    """Layer norm that returns the dtype of its input, whatever that of its parameters is.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the variance.
        elementwise_affine: have a weight and a bias.
        memory_efficient: changes nothing.
    """

    names = ("weight", "bias")

    def forward(self, input: Tensor) -> Tensor:
        """Return the layer norm of `input`, floating, of shape (..., *normalized_shape)."""
        return _layer_norm(input, self.weight, self.bias, self.normalized_shape, self.eps, self._dtype(input))


class FusedRMSNorm(_Norm):
    """RMS norm that returns the dtype of its input, whatever that of its weight is.

    Args:
        normalized_shape: the last dimensions of the input.
        eps: added to the mean square.
        elementwise_affine: have a weight.
        memory_efficient: changes nothing.
    """

    def forward(self, input: Tensor) -> Tensor:
        """Return the RMS norm of `input`, floating, of shape (..., *normalized_shape)."""
        return manual_rms_norm(input, self.normalized_shape, self.weight, self.eps).to(self._dtype(input))


class _Mixed(_Norm):
    """Returns the dtype of its weight, and always has one."""

    weight: nn.Parameter

    def __init__(
        self,
        normalized_shape: Shape,
        eps: float = 1e-5,
        *,
        memory_efficient: bool = False,
        elementwise_affine: bool | None = None,
    ) -> None:
        name = type(self).__name__
        if elementwise_affine is not None:
            if not elementwise_affine:
                raise RuntimeError(f"{name} always has weights: use FusedLayerNorm or FusedRMSNorm without Mixed")
            warnings.warn(f"{name} always has weights: leave out elementwise_affine", stacklevel=2)
        super().__init__(normalized_shape, eps, True, memory_efficient)

    def _dtype(self, input: Tensor) -> torch.dtype:
        return self.weight.dtype


class MixedFusedLayerNorm(_Mixed, FusedLayerNorm):
    """FusedLayerNorm that returns the dtype of its weight.

    Raises:
        RuntimeError: elementwise_affine is False.
    """


class MixedFusedRMSNorm(_Mixed, FusedRMSNorm):
    """FusedRMSNorm that returns the dtype of its weight.

    Raises:
        RuntimeError: elementwise_affine is False.
    """
