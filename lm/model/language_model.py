"""The language model. It knows no precision mode: dtypes follow from its weights and from autocast."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from lm.model.decoder_loss import decoder_loss
from lm.model.kernels import compute_dtype, linear
from lm.model.kinds import KINDS
from lm.model.recurrent import GRU, LSTM, RNN, Recurrent
from lm.model.transformer import Transformer, positions

INIT_RANGE = 0.1

Hidden = Tensor | tuple[Tensor, ...]
"""State of the recurrent layers, each tensor of shape (nlayers, batch, nhid); a pair (h, c) for LSTM, () for none."""


class RNNModel(nn.Module):
    """Embedding, recurrent or Transformer layers, and a linear decoder over the vocabulary.

    Weights start uniform in +-0.1 (embedding, decoder) and as torch.nn draws them (the layers between), in fp32.

    Args:
        kind: one of `KINDS`.
        ntokens: size of the vocabulary.
        emsize: size of the word embeddings.
        nhid: hidden units a layer; of a Transformer, whose width is `emsize`, those of its feed-forward networks.
        nlayers: layers between embedding and decoder.
        dropout: probability, on the embeddings, between the layers and on the output; of a Transformer, on the
            embeddings with their positions and within the layers.
        tied: share the embedding with the decoder; recurrent layers need `emsize == nhid` for that.
        nhead: heads of a Transformer's attention.
        context: how many words at a time a Transformer is trained on, and sees when it writes text.

    Raises:
        ValueError: unknown `kind`, `tied` with `emsize != nhid`, `emsize` no multiple of `nhead`, or no `context`.
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
        nhead: int = 2,
        context: int = 35,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; allowed are {', '.join(KINDS)}")
        is_transformer = kind == "Transformer"
        if is_transformer and (emsize % nhead or context < 1):
            raise ValueError(f"emsize {emsize} is no multiple of nhead {nhead}, or context {context} is not above 0")
        if tied and emsize != nhid and not is_transformer:
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
        if is_transformer:
            self.options |= {"nhead": nhead, "context": context}
        self.drop = nn.Dropout(dropout)
        self.encoder = nn.Embedding(ntokens, emsize)
        self.rnn: Recurrent | Transformer
        if is_transformer:
            self.rnn = Transformer(emsize, nhead, nhid, nlayers, dropout)
        else:
            self.rnn = _recurrent_layers(kind, emsize, nhid, nlayers, dropout)
        self.decoder = nn.Linear(emsize if is_transformer else nhid, ntokens)
        if tied:
            self.decoder.weight = self.encoder.weight
        nn.init.uniform_(self.encoder.weight, -INIT_RANGE, INIT_RANGE)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -INIT_RANGE, INIT_RANGE)

    def init_hidden(self, batch_size: int) -> Hidden:
        """Return zeros in the dtype that the recurrent layers return here; call it in the mode's forward context.

        Under CPU autocast a GRU given an fp32 state would stay in fp32, and no longer be the half mode asked for.
        """
        if isinstance(self.rnn, Transformer):
            return ()
        weight = next(self.rnn.parameters())
        shape = (self.rnn.num_layers, batch_size, self.rnn.hidden_size)
        zeros = torch.zeros(shape, dtype=compute_dtype(weight), device=weight.device)
        return (zeros, zeros) if isinstance(self.rnn, nn.LSTM) else zeros

    def forward(self, tokens: Tensor, hidden: Hidden, targets: Tensor | None = None) -> tuple[Tensor, Hidden]:
        """Return the scores of each next word, or how well they foretell `targets`.

        Args:
            tokens: int64, shape (bptt, batch).
            hidden: as `init_hidden` or the last call returned it.
            targets: the words that follow: int64, shape (bptt * batch,).

        Returns:
            Logits of shape (bptt, batch, ntokens) in the dtype of the decoder product, or, given targets, their
            mean cross entropy (fp32, shape ()), for which logits need not be kept; and the new state.
        """
        output, hidden = self.features(tokens, hidden)
        decoder = self.decoder
        if targets is None:
            return linear(output, decoder.weight, decoder.bias), hidden
        return decoder_loss(output.flatten(0, 1), decoder.weight, decoder.bias, targets), hidden

    def features(self, tokens: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
        """Return the decoder's input, of shape (bptt, batch, width), and the new state; arguments as of `forward`."""
        embedded = self.encoder(tokens)
        if isinstance(self.rnn, Transformer):
            embedded = embedded * math.sqrt(embedded.size(-1))  # else the positions would drown it
            output, hidden = self.rnn(self.drop(embedded + positions(len(tokens), embedded)), hidden)
            return output, hidden
        # Autocast leaves the embedding in fp32. Given that, the CPU's LSTM hands fp16 to an oneDNN primitive
        # that many CPUs lack; given half, it runs the kernels that half weights run, on every CPU.
        output, hidden = self.rnn(self.drop(embedded).to(hidden[0].dtype), hidden)
        return self.drop(output), hidden


def _recurrent_layers(kind: str, emsize: int, nhid: int, nlayers: int, dropout: float) -> Recurrent:
    dropout = dropout if nlayers > 1 else 0.0  # torch drops between layers only, and warns where there is one
    if kind == "LSTM":
        return LSTM(emsize, nhid, nlayers, dropout=dropout)
    if kind == "GRU":
        return GRU(emsize, nhid, nlayers, dropout=dropout)
    nonlinearity = kind.removeprefix("RNN_").lower()
    return RNN(emsize, nhid, nlayers, nonlinearity=nonlinearity, dropout=dropout)


def next_word_loss(model: nn.Module, tokens: Tensor, targets: Tensor, hidden: Hidden) -> tuple[Tensor, Hidden]:
    """Return the mean cross entropy in nats a word (fp32, shape ()), and the new state.

    `model` is an RNNModel, or wraps one; the other arguments are those of `RNNModel.forward`. The new state has the
    dtype of `hidden`.
    """
    loss, after = model(tokens, hidden, targets)
    if isinstance(after, tuple):  # O2 of apex casts all that a model returns to fp32, from which nothing is lost
        return loss, tuple(new.to(old.dtype) for new, old in zip(after, hidden, strict=True))
    return loss, after.to(hidden.dtype)  # type: ignore[union-attr]


def detach(hidden: Hidden) -> Hidden:
    """Return `hidden` without its history, so that gradients stop at the batch's first word.

    What is not finite starts anew at 0, as all of it does in each epoch: one bad batch must not spoil every later one.
    """
    if isinstance(hidden, tuple):
        return tuple(_finite(h.detach()) for h in hidden)
    return _finite(hidden.detach())


def _finite(state: Tensor) -> Tensor:
    return state.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)  # without a wait for the device
