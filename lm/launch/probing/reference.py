"""The true gradient of a batch: the trainers' model and loss, in float64."""

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lm.launch.probing.boundaries import watch
from lm.model.language_model import Hidden, RNNModel, detach
from roundoff.gradients.tally import pieces

SLICE_BYTES = 1 << 24
"""Of a slice of float64 logits: 63 rows of 33,280. All 700 rows would take 186 MB, and their gradient again."""

NEGLIGIBLE = 2.0**-40
"""Of a tensor's largest element: less is taken for 0. A key's bias in attention has no gradient, since softmax does not
see it, but float64's rounding leaves some 2**-50 of the others there."""


class Reference:
    """A float64 copy of `model` in training mode, which keeps the gradients of its last batch.

    Attributes:
        boundaries: those of `watch`, float64.
    """

    def __init__(self, model: RNNModel) -> None:
        self.model = copy.deepcopy(model).double().train()
        self.model.encoder.sparse = not model.options["tied"]  # 53 MB less at 33,280 words of 200 numbers
        self.boundaries = watch(self.model)

    def gradients(self) -> dict[str, tuple[Tensor, Tensor | None]]:
        """Name of the parameter -> gradient of the mean cross entropy, float64; nobody else may change it.

        With it go the numbers of those rows that it has; None: all. Other rows of an embedding have no gradient in any
        mode, unless they are the decoder's too.
        """
        return {name: _gradient(p) for name, p in self.model.named_parameters()}

    def init_hidden(self, batch_size: int) -> Hidden:
        """Of the first batch."""
        return self.model.init_hidden(batch_size)

    def run(self, tokens: Tensor, targets: Tensor, hidden: Hidden, see: Callable[[Tensor], None]) -> Hidden:
        """Forward and backward; return the state after the batch.

        Args:
            tokens, targets, hidden: as of `RNNModel.forward`.
            see: is shown the gradient of the logits, a slice of rows at a time, float64.
        """
        self.model.zero_grad()
        features, hidden = self.model.features(tokens, hidden)
        gradient = self._decode(features.detach().flatten(0, 1), targets, see)
        features.backward(gradient.view_as(features))  # type: ignore[no-untyped-call]
        self.model.encoder.weight.grad = _coalesced(self.model.encoder.weight)
        for found in (*(gradient for gradient, _ in self.gradients().values()), *self.boundaries.values()):
            _drop_negligible(found)
        return detach(hidden)

    def _decode(self, features: Tensor, targets: Tensor, see: Callable[[Tensor], None]) -> Tensor:
        """The gradient of `features`; those of the decoder are put into place."""
        weight, bias = self.model.decoder.weight.detach(), self.model.decoder.bias.detach()
        of_features, of_weight, of_bias = torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, SLICE_BYTES // (8 * len(weight)))
        for start in range(0, len(features), rows):
            part, words = features[start : start + rows], targets[start : start + rows, None]
            gradient = torch.softmax(torch.addmm(bias, part, weight.t()), 1)
            gradient.scatter_add_(1, words, gradient.new_full(words.shape, -1.0))
            gradient /= len(targets)
            see(gradient)
            torch.mm(gradient, weight, out=of_features[start : start + rows])
            of_weight.addmm_(gradient.t(), part)
            of_bias += gradient.sum(0)
        self.model.decoder.weight.grad, self.model.decoder.bias.grad = of_weight, of_bias
        return of_features


def _drop_negligible(gradient: Tensor) -> None:
    low, high = gradient.aminmax()
    bound = max(-float(low), float(high)) * NEGLIGIBLE
    for part in pieces(gradient) if gradient.is_contiguous() else [gradient]:
        part.copy_(F.hardshrink(part, bound))


def _coalesced(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    return gradient.coalesce() if gradient is not None and gradient.is_sparse else gradient


def _gradient(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    gradient: Any = parameter.grad
    return (gradient.values(), gradient.indices()[0]) if gradient.is_sparse else (gradient, None)
