"""torch's recurrent layers, at a usable speed for fp16 on every CPU.

On a CPU without fp16 instructions torch multiplies fp16 matrices one element at a time: 460 ms for forward and backward
of the default LSTM, of a step of 1,000, on an AMD Zen 4. There the layers below run in fp32 between two roundings to
fp16, in a tenth of that. They are fp16 in storage and fp32 in arithmetic: rounded are the sums of a cell before its
nonlinearities, and the states after them, at every time step; and so their gradients on the way back. A weight's
gradient is summed over all time steps in fp32 and rounded once. torch's own fp16 kernel rounds after every operation.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lm.kernels import fp16_through_fp32


def _rounded(x: Tensor) -> Tensor:
    """`x` (fp32) rounded to fp16, and its gradient on the way back."""
    return x.half().float()


class _BiasOverTime(torch.autograd.Function):
    """The bias of `h @ weight.T + bias` at every time step, which takes the gradient of the weight as well.

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


def _lstm_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    h, c = state
    i, f, g, o = _rounded(x + torch.addmm(bias, h, weight)).chunk(4, 1)
    c = _rounded(torch.addcmul(f.sigmoid() * c, i.sigmoid(), g.tanh()))
    return [_rounded(o.sigmoid() * c.tanh()), c]


def _gru_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    (h,) = state
    r_x, z_x, n_x = _rounded(x).chunk(3, 1)
    r_h, z_h, n_h = _rounded(torch.addmm(bias, h, weight)).chunk(3, 1)
    n = torch.addcmul(n_x, (r_x + r_h).sigmoid(), n_h).tanh()
    return [_rounded(torch.lerp(n, h, (z_x + z_h).sigmoid()))]


def _tanh_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [_rounded(_rounded(x + torch.addmm(bias, state[0], weight)).tanh())]


def _relu_cell(x: Tensor, state: list[Tensor], weight: Tensor, bias: Tensor) -> list[Tensor]:
    return [_rounded(x + torch.addmm(bias, state[0], weight)).relu()]


CELLS = {"LSTM": _lstm_cell, "GRU": _gru_cell, "RNN_TANH": _tanh_cell, "RNN_RELU": _relu_cell}


def through_fp32(rnn: nn.RNNBase, input: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """What `rnn` computes in fp16, with every product in fp32.

    Args:
        rnn: its weights are fp16, or fp32 and to be rounded, as under autocast.
        input: fp16, shape (time, batch, input size).
        state: h, or h and c: fp16, each of shape (layers, batch, hidden size).

    Returns:
        Output of the last layer and new state, fp16, shaped alike.
    """
    cell = CELLS[rnn.mode]
    last: list[list[Tensor]] = []
    for layer, weights in enumerate(rnn.all_weights):
        w_x, w_h, b_x, b_h = (w.half().float() for w in weights)
        of_layer = [s[layer].float() for s in state]
        products = F.linear(input.float(), w_x, b_x)
        states: list[Tensor] = []
        biases = _BiasOverTime.apply(w_h, b_h, states, products.shape[:2])  # type: ignore[no-untyped-call]
        outputs = []
        for x, bias in zip(products, biases, strict=True):
            states.append(of_layer[0].detach())
            of_layer = cell(x, of_layer, w_h.detach().t(), bias)
            outputs.append(of_layer[0])
        input = torch.stack(outputs).half()
        if layer + 1 < rnn.num_layers:
            input = F.dropout(input, rnn.dropout, rnn.training)
        last.append(of_layer)
    return input, [torch.stack(states).half() for states in zip(*last, strict=True)]


class _EveryCPU:
    """Stands before a recurrent layer in a class's bases, and steps in where `fp16_through_fp32` says so."""

    def forward(self: Any, input: Tensor, hx: Any = None) -> Any:
        """As that of the layer, but `hx` must be given."""
        if not fp16_through_fp32(self.weight_hh_l0):
            return super().forward(input, hx)  # type: ignore[misc]
        with torch.autocast("cpu", enabled=False):
            output, state = through_fp32(self, input, list(hx) if isinstance(hx, tuple) else [hx])
        return output, tuple(state) if isinstance(hx, tuple) else state[0]


class LSTM(_EveryCPU, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM`."""


class GRU(_EveryCPU, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU`."""


class RNN(_EveryCPU, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN`."""
