"""Compute the true gradient of a batch: the trainers' model and loss, in float64."""

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm.data.corpus import get_batch
from lm.launch.probing.boundaries import LOGITS, tensor_names, watch
from lm.model.language_model import Hidden, RNNModel, detach
from roundoff.gradients.measure import ParameterGradients
from roundoff.gradients.tally import drop_negligible

SLICE_BYTES = 1 << 24
"""The size of a slice of float64 logits: 63 rows of 33,280. All 700 rows take 186 MB, and their gradient again."""


class Batch(NamedTuple):
    """Holds what the model reads of a batch: arguments of `RNNModel.forward`.

    Attributes:
        hidden: float64.
    """

    tokens: Tensor
    targets: Tensor
    hidden: Hidden


class Reference:
    """A float64 copy of a model in training mode, which keeps the gradients of its last batch.

    Args:
        model: fp32; it stays as it is.

    Attributes:
        kinds: name of what is measured -> "parameter" or "boundary", in forward order.
        weights: name of a parameter -> its weight, fp32.
        boundaries: name of a boundary -> its gradient, float64, but for the logits.
        hidden: the state after the last batch, float64; None before the first one.
        outputs: "loss" of the last batch, in nats a word, float64.
    """

    def __init__(self, model: RNNModel) -> None:
        self.kinds = tensor_names(model)
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.model = copy.deepcopy(model).double().train()
        self.model.encoder.sparse = not model.options["tied"]  # 53 MB less at 33,280 words of 200 numbers
        self.boundaries = watch(self.model)
        self.hidden: Hidden | None = None
        self.outputs: dict[str, Tensor] = {}

    def gradients(self) -> ParameterGradients:
        """Return each parameter's gradient of the mean cross entropy, float64, and the rows that it has.

        An embedding has the rows of the batch's words, unless it is the decoder too. Nobody may change a gradient.
        """
        return {name: _gradient(p) for name, p in self.model.named_parameters()}

    def batches(self, data: Tensor, starts: Iterable[int], bptt: int) -> Iterator[Batch]:
        """Yield a batch of `data`, as `get_batch` cuts it, for each start; each carries the state after the last.

        The first one carries the state 0.
        """
        self.hidden = None
        for start in starts:
            hidden = self.model.init_hidden(data.size(1)) if self.hidden is None else self.hidden
            yield Batch(*get_batch(data, start, bptt), hidden)

    def run(self, batch: Batch, see: Callable[[str, Tensor], None]) -> None:
        """Go forward and backward over `batch`.

        Args:
            batch: tokens, targets and state.
            see: is shown the gradient of the logits, a slice of rows at a time, float64.
        """
        self.model.zero_grad()
        features, hidden = self.model.features(batch.tokens, batch.hidden)
        gradient = self._decode(features.detach().flatten(0, 1), batch.targets, see)
        features.backward(gradient.view_as(features))  # type: ignore[no-untyped-call]
        self.model.encoder.weight.grad = _coalesced(self.model.encoder.weight)
        for found in (*(gradient for gradient, _ in self.gradients().values()), *self.boundaries.values()):
            drop_negligible(found)
        self.hidden = detach(hidden)

    def _decode(self, features: Tensor, targets: Tensor, see: Callable[[str, Tensor], None]) -> Tensor:
        """Return the gradient of `features`, and put those of the decoder into place."""
        weight, bias = self.model.decoder.weight.detach(), self.model.decoder.bias.detach()
        of_features, of_weight, of_bias = torch.empty_like(features), torch.zeros_like(weight), torch.zeros_like(bias)
        rows = max(1, SLICE_BYTES // (8 * len(weight)))
        loss = torch.zeros((), dtype=torch.float64)
        memory = features.new_empty(min(rows, len(features)), len(weight))
        for start in range(0, len(features), rows):
            part, words = features[start : start + rows], targets[start : start + rows, None]
            logits = torch.addmm(bias, part, weight.t(), out=memory[: len(part)])
            gradient = torch.softmax(logits, 1, out=logits)
            loss -= gradient.gather(1, words).log().sum()
            gradient.scatter_add_(1, words, gradient.new_full(words.shape, -1.0))
            gradient /= len(targets)
            see(LOGITS, gradient)
            torch.mm(gradient, weight, out=of_features[start : start + rows])
            of_weight.addmm_(gradient.t(), part)
            of_bias += gradient.sum(0)
        self.outputs = {"loss": (loss / len(targets)).reshape(1)}
        self.model.decoder.weight.grad, self.model.decoder.bias.grad = of_weight, of_bias
        return of_features


def _coalesced(parameter: Tensor) -> Tensor | None:
    gradient = parameter.grad
    return gradient.coalesce() if gradient is not None and gradient.is_sparse else gradient


def _gradient(parameter: Tensor) -> tuple[Tensor, Tensor | None]:
    gradient: Any = parameter.grad
    return (gradient.values(), gradient.indices()[0]) if gradient.is_sparse else (gradient, None)
