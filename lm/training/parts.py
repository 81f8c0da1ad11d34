"""The parts of a batch: with --accumulate a step computes some columns of its batch at a time, and adds gradients up.

A column is a text of its own with a hidden state of its own, so a part trains as the same columns of the whole batch
do. Each part's mean loss is multiplied by its share of the columns, in fp32 and before the loss scale. The sum of the
parts' gradients is so the gradient of the mean over the batch. Each gradient of a logit has the size that it has in the
whole batch, so a loss scale serves both alike.

Backward passes add to the parameters' own gradients, and a sum is rounded to their dtype: fp32 for fp32 weights, under
autocast too, and half for half weights. Each part draws dropout masks of its own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from lm.model.language_model import Hidden


class Part(NamedTuple):
    """Some columns of a batch.

    Attributes:
        tokens: int64, shape (seq_len, columns).
        targets: int64, shape (seq_len * columns,).
        hidden: before the batch; None at the first batch of an epoch.
        weight: this part's share of the columns of the batch.
        is_last: whether no other part follows.
    """

    tokens: Tensor
    targets: Tensor
    hidden: Hidden | None
    weight: float
    is_last: bool


def parts_of(tokens: Tensor, targets: Tensor, hidden: Hidden | None, count: int) -> list[Part]:
    """Return a batch in `count` parts, whose numbers of columns differ by one at most; arguments are as of `Part`."""
    if count == 1:
        return [Part(tokens, targets, hidden, 1.0, True)]
    columns = tokens.size(1)
    some_tokens = tokens.tensor_split(count, dim=1)
    some_targets = targets.view(-1, columns).tensor_split(count, dim=1)
    some_hidden = [None] * count if hidden is None else _split(hidden, count)
    return [
        Part(t.contiguous(), y.flatten(), h, t.size(1) / columns, k == count - 1)
        for k, (t, y, h) in enumerate(zip(some_tokens, some_targets, some_hidden, strict=True))
    ]


def _split(hidden: Hidden, count: int) -> list[Hidden]:
    if isinstance(hidden, Tensor):
        return [h.contiguous() for h in hidden.tensor_split(count, dim=1)]
    return [tuple(h.tensor_split(count, dim=1)[k].contiguous() for h in hidden) for k in range(count)]


def joined(states: list[Hidden]) -> Hidden:
    """Return the hidden state of a whole batch after its parts, which left these."""
    if len(states) == 1:
        return states[0]
    tensors = zip(*(state if isinstance(state, tuple) else (state,) for state in states), strict=True)
    whole = tuple(torch.cat([h.detach() for h in parts], dim=1) for parts in tensors)
    return whole if isinstance(states[0], tuple) else whole[0]
