"""The language model. It knows no precision mode: dtypes follow from its weights and from autocast."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lm.kernels import compute_dtype, linear

KINDS = ("RNN_TANH", "RNN_RELU", "LSTM", "GRU")
INIT_RANGE = 0.1

Hidden = Tensor | tuple[Tensor, Tensor]
"""State of the recurrent layers, each tensor of shape (nlayers, batch, nhid); a pair (h, c) for LSTM."""


class RNNModel(nn.Module):
    """Embedding, recurrent layers, and a linear decoder over the vocabulary.

    Weights start uniform in +-0.1 (embedding, decoder) and as torch.nn draws them (recurrent layers), in fp32.

    Args:
        kind: one of `KINDS`.
        ntokens: size of the vocabulary.
        emsize: size of the word embeddings.
        nhid: hidden units a layer.
        nlayers: recurrent layers.
        dropout: probability, on the embeddings, between the layers and on the output.
        tied: share the embedding with the decoder; needs `emsize == nhid`.

    Raises:
        ValueError: unknown `kind`, or `tied` with `emsize != nhid`.
    """

    def __init__(
        self,
        kind: str,
        ntokens: int,
        emsize: int,
        nhid: int,
        nlayers: int,
        dropout: float,
        tied: bool = False,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
        if tied and emsize != nhid:
            raise ValueError(f"tied needs emsize equal to nhid; they are {emsize} and {nhid}")
        self.options: dict[str, Any] = {
            "kind": kind,
            "ntokens": ntokens,
            "emsize": emsize,
            "nhid": nhid,
            "nlayers": nlayers,
            "dropout": dropout,
            "tied": tied,
        }
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntokens, emsize)
        self.rnn = _recurrent_layers(kind, emsize, nhid, nlayers, dropout)
        self.decoder = nn.Linear(nhid, ntokens)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -INIT_RANGE, INIT_RANGE)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -INIT_RANGE, INIT_RANGE)

    def init_hidden(self, batch_size: int) -> Hidden:
        """Zeros in the dtype that the recurrent layers return here; call it in the mode's forward context.

        Under CPU autocast a GRU given an fp32 state would stay in fp32, and no longer be the half mode asked for.
        """
        weight = next(self.rnn.parameters())
        shape = (self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        zeros = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        return (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else zeros

    def forward(self, tokens: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Scores of each next word.

        Args:
            tokens: int64, shape (bptt, batch).
            hidden: as `init_hidden` or the last call returned it.

        Returns:
            Logits of shape (bptt, batch, ntokens) in the dtype of the decoder product, and the new state.
        """
        embedded = self.drop(self.encoder(tokens))
        # Autocast leaves the embedding in fp32. Given that, the CPU's LSTM hands fp16 to an oneDNN primitive
        # that many CPUs lack; given half, it runs the kernels that half weights run, on every CPU.
        embedded = embedded.to(hidden[0].dtype)
        output, hidden = self.rnn(embedded, hidden)
        return linear(self.drop(output), self.decoder.weight, self.decoder.bias), hidden


def _recurrent_layers(kind: str, emsize: int, nhid: int, nlayers: int, dropout: float) -> nn.RNNBase:
    dropout = dropout if nlayers > 1 else 0.0  # torch drops between layers only, and warns where there is one
    if kind == "LSTM":
        return nn.LSTM(emsize, nhid, nlayers, dropout=dropout)
    if kind == "GRU":
        return nn.GRU(emsize, nhid, nlayers, dropout=dropout)
    nonlinearity = kind.removeprefix("RNN_").lower()
    return nn.RNN(emsize, nhid, nlayers, nonlinearity=nonlinearity, dropout=dropout)


def next_word_loss(model: nn.Module, tokens: Tensor, targets: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
    """Mean cross entropy in nats a word (fp32, shape ()) of an RNNModel, or of one that is wrapped, and the new state.

    Logits are cast up before the softmax: a sum over a vocabulary, and a mean over a batch, in fp16 lose the
    digits in which precision modes differ.
    """
    logits, hidden = model(tokens, hidden)
    return F.cross_entropy(logits.flatten(0, 1).float(), targets), hidden


def detach(hidden: Hidden) -> Hidden:
    """`hidden` without its history, so that gradients stop at the batch's first word.

    What is not finite starts anew at 0, as all of it does in each epoch: one bad batch must not spoil every later one.
    """
    if isinstance(hidden, tuple):
        return _finite(hidden[0].detach()), _finite(hidden[1].detach())
    return _finite(hidden.detach())


def _finite(state: Tensor) -> Tensor:
    return state.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # without a wait for the device
