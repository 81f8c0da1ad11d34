"""Compute a batch's gradient in one precision mode of the language model, as its trainer does."""

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn

from lm.launch.probing.boundaries import LOGITS, watch
from lm.launch.probing.reference import Batch
from lm.model.decoder_loss import logits_of
from lm.model.language_model import Hidden, RNNModel, next_word_loss
from lm.options.options import Options
from lm.training.preflight import try_once
from roundoff.gradients.measure import ScaledGradients
from roundoff.precision import Precision

MakePrecision = Callable[[Options, RNNModel], Precision]
Precisions = Mapping[str, MakePrecision]
"""Trainer, such as "main_amp" -> its `make_precision`."""


class Mode:
    """Computes gradients with a trainer's own precision management.

    Args:
        name: of `lm.options.modes.MODES`.
        args: the options of the mode's trainer.
        make_precision: that trainer's.
        model: fp32, on the CPU; it stays as it is.

    Attributes:
        description: the trainer's file name.
        scale: the loss scale that training starts with.
        dtype: of the products.
    """

    def __init__(self, name: str, args: Options, make_precision: MakePrecision, model: RNNModel) -> None:
        self.name, self.args = name, args
        self.description = f"{args.script}.py"
        self.scale = float(args.loss_scale or args.init_scale)
        self.dtype: torch.dtype = getattr(torch, args.dtype)
        self._make_precision, self._model = make_precision, model

    def dtypes(self) -> dict[str, str]:
        """Return the dtypes that really run, as in config.json.

        Raises:
            UsageError: this machine cannot run the mode.
        """
        model = _copy(self._model)
        return try_once(model, self._make_precision(self.args, model), self.args)

    def gradients(self, batch: Batch) -> ScaledGradients:
        """Return the gradients of the mean cross entropy of `batch`.

        Dropout draws from torch's generator. The float64 state is rounded where the mode's state is half.
        """
        model = _copy(self._model).train()
        precision = self._make_precision(self.args, model)
        boundaries = watch(model)
        with precision.forward():
            hidden = _like(batch.hidden, model.init_hidden(batch.tokens.size(1)))
            loss, _ = next_word_loss(model, batch.tokens, batch.targets, hidden)
        logits = logits_of(loss)
        precision.backward(loss)
        parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return ScaledGradients(parameters, boundaries | {LOGITS: logits}, {"loss": loss.detach().double().reshape(1)})


def _copy(model: RNNModel) -> RNNModel:
    """Copy `model` with gradients of its own, but the same weights until they become half."""
    parameters = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def _like(hidden: Hidden, template: Hidden) -> Hidden:
    if isinstance(hidden, tuple):
        return tuple(h.to(t.dtype) for h, t in zip(hidden, template, strict=True))
    return hidden.to(template.dtype)  # type: ignore[union-attr]
