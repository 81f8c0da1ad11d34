"""Evaluation: the loss of a model over a whole text."""

from collections.abc import Callable

import torch
from torch import Tensor

from lm.data.corpus import get_batch
from lm.model.decoder_loss import constant_weights
from lm.model.language_model import RNNModel, next_word_loss
from roundoff.precision import Precision
from roundoff.terminal import progress_bar


@torch.no_grad()
def evaluate(
    model: RNNModel,
    precision: Precision,
    source: Tensor,
    bptt: int,
    max_batches: int | None = None,
    between: Callable[[], None] = lambda: None,
) -> float:
    """Return the mean cross entropy in nats a word over `source` (shape (rows, columns)), summed in float64.

    `between` is called before each batch. The model loses its gradients, for their memory.
    """
    model.eval()
    model.zero_grad()
    starts = range(0, len(source) - 1, bptt)[:max_batches]
    losses = torch.empty(len(starts), device=source.device)  # one by one, they would lie in the holes that logits leave
    words = []
    with precision.forward(), constant_weights():
        hidden = model.init_hidden(source.size(1))
        for k, i in enumerate(progress_bar(starts, "evaluation")):
            between()
            tokens, targets = get_batch(source, i, bptt)
            losses[k], hidden = next_word_loss(model, tokens, targets, hidden)
            words.append(targets.numel())
    weights = torch.tensor(words, dtype=torch.float64)
    return float((losses.cpu().double() * weights).sum() / weights.sum())
