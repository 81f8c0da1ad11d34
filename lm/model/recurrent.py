"""torch's recurrent layers, at a usable speed for fp16 and bf16 on every CPU.

On a CPU without instructions for them torch multiplies half matrices one element at a time: 460 ms for forward and
backward of the default LSTM in fp16, of a step of 1,000, on an AMD Zen 4. There the layers below run in fp32 between
two roundings to half, in a tenth of that. They are half in storage and fp32 in arithmetic: rounded are the sums of a
cell before its nonlinearities, and the states after them, at every time step; and so their gradients on the way back.
A weight's gradient is summed over all time steps in fp32 and rounded once. torch's own half kernels round after every
operation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lm.model.kernels import compute_dtype, half_through_fp32, rounded


class _BiasOverTime(torch.autograd.Function):
    """Hands out the bias of `h @ weight.T + bias` at every time step, and takes the gradient of the weight as well.

    Left to autograd, the weight's gradient would be a small product and a sum of two whole matrices at each step:
    forward and backward of layers of 650 units then take 1.5 times as long (of 200 units, as long as now).
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, states: list[Tensor], shape: tuple[int, int]) -> Tensor:
        ctx.states = states  # to be filled by the caller: every h that was multiplied
        return bias.expand(*shape, -1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad, states = grad.flatten(0, 1), torch.cat(ctx.states)
        ctx.states.clear()  # which would live as long as somebody keeps the loss
        return grad.t() @ states, grad.sum(0), None, None


def _lstm_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor, half: torch.dtype) -> list[Tensor]:
    h, c = state
    i, f, g, o = rounded(x + torch.addmm(bias, h, weight), half).chunk(4, 1)
    c = rounded(torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh()), half)
    return [rounded(o.sigmoid() * c.tanh(), half), c]


def _gru_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor, half: torch.dtype) -> list[Tensor]:
    (h,) = state
    r_x, z_x, n_x = rounded(x, half).chunk(3, 1)
    r_h, z_h, n_h = rounded(torch.addmm(bias, h, weight), half).chunk(3, 1)
    n = torch.addcmul(n_x, (r_x + r_h).sigmoid(), n_h).tanh()
    return [rounded(torch.lerp(n, h, (z_x + z_h).sigmoid()), half)]


def _tanh_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor, half: torch.dtype) -> list[Tensor]:
    return [rounded(rounded(x + torch.addmm(bias, state[0], weight), half).tanh(), half)]


def _relu_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor, half: torch.dtype) -> list[Tensor]:
    return [rounded(x + torch.addmm(bias, state[0], weight), half).relu()]


CELLS = {"LSTM": _lstm_cell, "GRU": _gru_cell, "RNN_TANH": _tanh_cell, "RNN_RELU": _relu_cell}


def through_fp32(rnn: nn.RNNBase, input: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Compute what `rnn` does in half, with every product in fp32.

    Args:
        rnn: its weights are half, or fp32 and to be rounded, as under autocast.
        input: fp16 or bf16, shape (time, batch, input size).
        state: h, or h and c: in the dtype of `input`, each of shape (layers, batch, hidden size).

    Returns:
        Output of the last layer and new state, in that dtype, shaped alike.
    """
    cell, half = CELLS[rnn.mode], input.dtype
    last: list[list[Tensor]] = []
    for layer, weights in enumerate(rnn.all_weights):
        w_x, w_h, b_x, b_h = (rounded(w, half) for w in weights)
        of_layer = [s[layer].float() for s in state]
        products = F.linear(input.float(), w_x, b_x)
        states: list[Tensor] = []
        biases = _BiasOverTime.apply(w_h, b_h, states, products.shape[:2])  # type: ignore[no-untyped-call]
        outputs = []
        for x, bias in zip(products, biases, strict=True):
            states.append(of_layer[0].detach())
            of_layer = cell(x, of_layer, w_h.detach().t(), bias, half)
            outputs.append(of_layer[0])
        input = torch.stack(outputs).to(half)
        if layer + 1 < rnn.num_layers:
            input = F.dropout(input, rnn.dropout, rnn.training)
        last.append(of_layer)
    return input, [torch.stack(states).to(half) for states in zip(*last, strict=True)]


class _EveryCPU:
    """Stands before a recurrent layer in a class's bases, and steps in where `half_through_fp32` says so."""

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """Call the layer; unlike there, `hx` must be given."""
        if not half_through_fp32(self.weight_hh_l0):
            return super().forward(input, hx)  # type: ignore[misc]
        half = compute_dtype(self.weight_hh_l0)
        with torch.autocast("cpu", enabled=False):
            states = hx if isinstance(hx, tuple) else (hx,)
            output, state = through_fp32(self, input.to(half), [s.to(half) for s in states])
        return output, tuple(state) if isinstance(hx, tuple) else state[0]


class LSTM(_EveryCPU, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM`."""


class GRU(_EveryCPU, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU`."""


class RNN(_EveryCPU, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN`."""
