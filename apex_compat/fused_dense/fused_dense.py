"""FusedDense and FusedDenseGeluDense, by torch's linear layers."""

import torch.nn.functional as F
from torch import Tensor, nn


def fused_dense_function(input: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return input @ weight.T + bias for an input (..., in), a weight (out, in) and a bias (out,)."""
    return F.linear(input, weight, bias)


def dense_no_bias_function(input: Tensor, weight: Tensor) -> Tensor:
    """Return input @ weight.T for an input (..., in) and a weight (out, in)."""
    return F.linear(input, weight)


def fused_dense_gelu_dense_function(
    input: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor
) -> Tensor:
    """Return linear(gelu(linear(input))). The gelu is the approximation by tanh, which cuBLASLt computes for apex."""
    return F.linear(F.gelu(F.linear(input, weight1, bias1), approximate="tanh"), weight2, bias2)


class FusedDense(nn.Linear):
    """Has the interface of apex.fused_dense.FusedDense: a linear layer, drawn as torch.nn.Linear is."""

    def __init__(self, in_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__(in_features, out_features, bias)


class FusedDenseGeluDense(nn.Module):
    """Has the interface of apex.fused_dense.FusedDenseGeluDense: two linear layers, gelu between them.

    Both are drawn as torch.nn.Linear is.

    Raises:
        ValueError: bias is False.
    """

    def __init__(self, in_features: int, intermediate_features: int, out_features: int, bias: bool = True) -> None:
        super().__init__()
        if not bias:
            raise ValueError("FusedDenseGeluDense always has biases: leave out bias=False, or use torch.nn.Linear")
        self.in_features = in_features
        self.intermediate_features = intermediate_features
        self.out_features = out_features
        first, second = nn.Linear(in_features, intermediate_features), nn.Linear(intermediate_features, out_features)
        self.weight1, self.bias1 = first.weight, first.bias
        self.weight2, self.bias2 = second.weight, second.bias

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, shape (..., out), for `input`, shape (..., in)."""
        return fused_dense_gelu_dense_function(input, self.weight1, self.bias1, self.weight2, self.bias2)
