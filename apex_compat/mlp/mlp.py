"""MLP: linear layers, each with its activation."""

from collections.abc import Callable, Sequence
from itertools import zip_longest

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"none": nn.Identity(), "relu": F.relu, "sigmoid": torch.sigmoid}


class MLP(nn.Module):
    """Has the interface of apex.mlp.MLP. The last layer has an activation too.

    The parameters are weight_0, bias_0, weight_1, ... Weights are drawn with the deviation sqrt(2 / (in + out)),
    biases with sqrt(1 / out).

    Args:
        mlp_sizes: features of the input, of each hidden layer and of the output.
        bias: have biases.
        activation: 'none', 'relu' or 'sigmoid'.

    Raises:
        TypeError: another activation.
    """

    def __init__(self, mlp_sizes: Sequence[int], bias: bool = True, activation: str = "relu") -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise TypeError(f"activation is {activation!r}; it must be one of {', '.join(ACTIVATIONS)}")
        self.mlp_sizes = list(mlp_sizes)
        self.num_layers = len(self.mlp_sizes) - 1
        self.bias = bias
        self.activation = activation
        for i, (fan_in, fan_out) in enumerate(zip(self.mlp_sizes[:-1], self.mlp_sizes[1:], strict=True)):
            self.register_parameter(f"weight_{i}", nn.Parameter(torch.empty(fan_out, fan_in)))
            self.register_parameter(f"bias_{i}", nn.Parameter(torch.empty(fan_out)) if bias else None)
        self.reset_parameters()

    @property
    def weights(self) -> list[Tensor]:
        """Return the weight of each layer, shape (out, in)."""
        return [self.get_parameter(f"weight_{i}") for i in range(self.num_layers)]

    @property
    def biases(self) -> list[Tensor]:
        """Return the bias of each layer, shape (out,); an empty list if there are none."""
        return [self.get_parameter(f"bias_{i}") for i in range(self.num_layers)] if self.bias else []

    def reset_parameters(self) -> None:
        """Draw all parameters anew."""
        for weight in self.weights:
            nn.init.normal_(weight, 0.0, (2.0 / sum(weight.shape)) ** 0.5)
        for bias in self.biases:
            nn.init.normal_(bias, 0.0, (1.0 / len(bias)) ** 0.5)

    def forward(self, input: Tensor) -> Tensor:
        """Return the output, shape (..., out), for `input`, shape (..., in)."""
        for weight, bias in zip_longest(self.weights, self.biases):
            input = ACTIVATIONS[self.activation](F.linear(input, weight, bias))
        return input

    def extra_repr(self) -> str:
        """Return the settings, for `repr`."""
        return f"MLP sizes: {self.mlp_sizes}, Bias={self.bias}, activation={self.activation}"
