"""LSTM, GRU, ReLU and Tanh: torch's layers, in a module that keeps the hidden state from call to call."""

from collections.abc import Callable
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn


class KeptState(nn.Module):
    """Runs `rnn` from the hidden state that its last call left, as the modules of apex.RNN do.

    The first call, and one with another batch size, begin with zeros. Gradients flow into earlier calls until
    `detach_hidden()`. The parameters are those of torch's layer, as `rnn.weight_ih_l0`.
    """

    def __init__(self, rnn: nn.RNNBase) -> None:
        super().__init__()
        self.rnn = rnn
        self.hidden: tuple[Tensor, ...] | None = None

    def forward(self, input: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the output, and the hidden state as a tuple: h alone, or h and c of an LSTM.

        Args:
            input: shape (time, batch, features), with batch_first (batch, time, features).

        Returns:
            The output, shape (time, batch, hidden), and tensors of shape (layers, batch, hidden); twice as many
            layers and features if the layer is bidirectional.
        """
        batch = input.size(0 if self.rnn.batch_first else 1)
        if self.hidden is not None and self.hidden[0].size(1) != batch:
            self.hidden = None
        single = not isinstance(self.rnn, nn.LSTM)
        start: Any = self.hidden[0] if self.hidden and single else self.hidden
        output, hidden = self.rnn(input, start)
        self.hidden = (hidden,) if single else hidden
        return output, self.hidden

    def reset_hidden(self, bsz: int | None = None) -> None:
        """Begin the next call with zeros. Its batch size is what its input says, not `bsz`."""
        self.hidden = None

    def detach_hidden(self) -> None:
        """Let no gradient flow into the calls so far."""
        if self.hidden is not None:
            self.hidden = tuple(tensor.detach() for tensor in self.hidden)


def _factory(name: str, layer: Callable[..., nn.RNNBase]) -> Callable[..., KeptState]:
    def make(
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0,
        bidirectional: bool = False,
        output_size: int | None = None,
    ) -> KeptState:
        """Return torch's layer of these arguments in a KeptState.

        Raises:
            NotImplementedError: output_size is another one than hidden_size.
        """
        if output_size not in (None, hidden_size):
            raise NotImplementedError(f"{name}(output_size=...) is not offered: use torch.nn.LSTM(proj_size=...)")
        return KeptState(
            layer(
                input_size,
                hidden_size,
                num_layers,
                bias=bias,
                batch_first=batch_first,
                dropout=dropout,
                bidirectional=bidirectional,
            )
        )

    make.__name__ = make.__qualname__ = name
    return make


LSTM = _factory("LSTM", nn.LSTM)
GRU = _factory("GRU", nn.GRU)
ReLU = _factory("ReLU", partial(nn.RNN, nonlinearity="relu"))
Tanh = _factory("Tanh", nn.RNN)


def mLSTM(*args: object, **kwargs: object) -> NoReturn:  # noqa: N802  # apex's name
    """Raise NotImplementedError: torch has no multiplicative LSTM."""
    raise NotImplementedError("apex.RNN.mLSTM is not offered, torch has no multiplicative LSTM: use apex.RNN.LSTM")
