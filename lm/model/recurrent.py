"""torch's recurrent layers, one at a time, and at a usable speed for fp16 and bf16 on every CPU.

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
from torch.backends import cudnn
from torch.backends.cudnn.rnn import get_cudnn_mode

from lm.model.kernels import compute_dtype, half_through_fp32, rounded, uncast, without_autocast


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
    @uncast
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


def through_fp32(
    mode: str, weights: list[Tensor], input: Tensor, state: list[Tensor], half: torch.dtype
) -> tuple[Tensor, list[Tensor]]:
    """Compute what a recurrent layer does in half, with every product in fp32.

    Args:
        mode: a key of `CELLS`.
        weights: w_ih, w_hh, b_ih, b_hh, which are half, or fp32 and to be rounded, as under autocast.
        input: shape (time, batch, input size).
        state: h, or h and c, each of shape (1, batch, hidden size).
        half: fp16 or bf16.

    Returns:
        Output and new state, in half, shaped alike.
    """
    cell = CELLS[mode]
    w_x, w_h, b_x, b_h = (rounded(w, half) for w in weights)
    now = [rounded(s[0], half) for s in state]
    products = F.linear(rounded(input, half), w_x, b_x)
    states: list[Tensor] = []
    biases = _BiasOverTime.apply(w_h, b_h, states, products.shape[:2])  # type: ignore[no-untyped-call]
    outputs = []
    for x, bias in zip(products, biases, strict=True):
        states.append(now[0].detach())
        now = cell(x, now, w_h.detach().t(), bias, half)
        outputs.append(now[0])
    return torch.stack(outputs).to(half), [s[None].to(half) for s in now]


def cast_together(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return `weights` in `dtype`, one after the other in one buffer: cuDNN takes that as it is, without a copy.

    Their gradients come back in the dtype of `weights`.
    """
    flat: Any = torch.cat([w.reshape(-1) for w in weights]).to(dtype)
    parts = flat.split([w.numel() for w in weights])
    return [part.view_as(w) for part, w in zip(parts, weights, strict=True)]


class _LayerByLayer:
    """Stands before a recurrent layer of torch in a class's bases, and runs its layers one at a time.

    cuDNN, given several at once, draws the dropout between them from a state of its own, which no checkpoint can hold.
    On a CPU the result equals that of several at once in every bit.
    """

    def forward(self: Any, input: Tensor, hx: Any) -> Any:
        """Call the layers; shapes are those of torch, batch second, and `hx` must be given."""
        states = hx if isinstance(hx, tuple) else (hx,)
        last: list[list[Tensor]] = []
        for index in range(self.num_layers):
            input, after = self.one_layer(index, input, [state[index : index + 1] for state in states])
            last.append(after)
            if index + 1 < self.num_layers:
                input = F.dropout(input, self.dropout, self.training)
        new = tuple(torch.cat(parts) for parts in zip(*last, strict=True))
        return input, new if isinstance(hx, tuple) else new[0]

    def one_layer(self: Any, index: int, input: Tensor, states: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Return the output of layer `index` and its state after the last word.

        Args:
            index: from 0.
            input: shape (time, batch, input size).
            states: h, or h and c, each of shape (1, batch, hidden size).
        """
        weights: list[Tensor] = self.all_weights[index]
        dtype, through = compute_dtype(weights[0]), half_through_fp32(weights[0])
        # Not left to autocast: on CUDA it takes float16 for cuDNN's layers, whatever dtype it was told.
        with without_autocast(weights[0]):
            if through:
                return through_fp32(self.mode, weights, input, states, dtype)
            if dtype is not weights[0].dtype:
                weights = cast_together(weights, dtype)
            return _call(self.mode, weights, input.to(dtype), [s.to(dtype) for s in states], self.training)

    def flatten_parameters(self: Any) -> None:
        """Lay the weights of each layer one after the other, as cuDNN wants them; else each call copies them there.

        torch's method, which it calls after every `.to()`, does so for all layers together.
        """
        if not all(isinstance(w, Tensor) and cudnn.is_acceptable(w) for w in self._flat_weights):  # type: ignore[no-untyped-call]
            return
        kind = get_cudnn_mode(self.mode)  # type: ignore[no-untyped-call]
        with torch.no_grad(), torch.cuda.device_of(self._flat_weights[0]):  # type: ignore[no-untyped-call]
            for w_ih, *others in self.all_weights:
                torch._cudnn_rnn_flatten_weight(
                    [w_ih, *others], 4, w_ih.size(1), kind, self.hidden_size, 0, 1, False, False
                )


def _call(
    mode: str, weights: list[Tensor], input: Tensor, states: list[Tensor], training: bool
) -> tuple[Tensor, list[Tensor]]:
    """Run torch's own function for one layer with biases, in one direction, without dropout."""
    options = (True, 1, 0.0, training, False, False)
    if mode == "LSTM":
        output, *after = torch.lstm(input, states, weights, *options)
        return output, after
    function = {"GRU": torch.gru, "RNN_TANH": torch.rnn_tanh, "RNN_RELU": torch.rnn_relu}[mode]
    output, state = function(input, states[0], weights, *options)
    return output, [state]


class LSTM(_LayerByLayer, nn.LSTM):  # type: ignore[misc]
    """`torch.nn.LSTM`."""


class GRU(_LayerByLayer, nn.GRU):  # type: ignore[misc]
    """`torch.nn.GRU`."""


class RNN(_LayerByLayer, nn.RNN):  # type: ignore[misc]
    """`torch.nn.RNN`."""


Recurrent = LSTM | GRU | RNN
