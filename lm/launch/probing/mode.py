"""One mode's gradient of a batch, as its trainer would compute it."""

import copy
import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lm.launch.probing.boundaries import LOGITS, watch
from lm.model.decoder_loss import logits_of
from lm.model.language_model import Hidden, RNNModel, next_word_loss
from lm.options.config import merge
from lm.options.modes import MODES
from lm.options.options import Options
from lm.training.preflight import try_once
from roundoff.precision import Precision

PROBED = ("fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
"""The default: fp16-optimizer at its static scale has the gradient of manual in every bit."""

MEASURED_KS = (0, 7, 16)
"""Exponents of the loss scales that are also measured: none, the default static one, and where a dynamic one starts."""


@dataclass(frozen=True)
class Gradients:
    """Still multiplied by the loss scale; each of its own dtype.

    Attributes:
        parameters: by name.
        boundaries: by name, the logits among them.
    """

    parameters: dict[str, Tensor]
    boundaries: dict[str, Tensor]


class Mode:
    """A mode, and what its trainer makes of flags.

    Args:
        name: of `MODES`.
        options: of the trainers, checked.

    Attributes:
        args: the trainer's.
        scale: the loss scale that it starts with.
        dtype: in which its products are computed.

    Raises:
        UsageError: the trainer refuses the flags.
    """

    def __init__(self, name: str, options: Mapping[str, Any]) -> None:
        mode = MODES[name]
        self.name = name
        self.args: Options = merge(mode.script, {**options, **mode.options})
        self.scale = float(self.args.static_loss_scale or self.args.init_scale)
        self.dtype: torch.dtype = getattr(torch, self.args.dtype)

    def dtypes(self, model: RNNModel) -> dict[str, str]:
        """Those that really run, as in config.json.

        Raises:
            UsageError: this machine cannot run the mode.
        """
        model = _copy(model)
        return try_once(model, build(self.args, model), self.args)

    def gradients(self, model: RNNModel, tokens: Tensor, targets: Tensor, hidden: Hidden) -> Gradients:
        """Of the mean cross entropy of a batch at the weights of `model` (fp32), which stays as it is.

        Draws its dropout from torch's generator. `hidden` is float64, and is rounded where the mode's state is half.
        """
        model = _copy(model).train()
        precision = build(self.args, model)
        boundaries = watch(model)
        with precision.forward():
            loss, _ = next_word_loss(model, tokens, targets, _like(hidden, model.init_hidden(tokens.size(1))))
        logits = logits_of(loss)
        precision.backward(loss)
        parameters = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return Gradients(parameters, boundaries | {LOGITS: logits})


def build(args: Options, model: RNNModel) -> Precision:
    """Return what the trainer of `args` makes of `model`, whose weights become half where the mode has them so."""
    precision: Precision = importlib.import_module(args.script).make_precision(args, model)
    return precision


def _copy(model: RNNModel) -> RNNModel:
    """`model` with gradients of its own, but the same weights until they become half."""
    parameters = {id(p): nn.Parameter(p.detach()) for p in model.parameters()}
    return copy.deepcopy(model, parameters)


def _like(hidden: Hidden, template: Hidden) -> Hidden:
    if isinstance(hidden, tuple):
        return tuple(h.to(t.dtype) for h, t in zip(hidden, template, strict=True))
    return hidden.to(template.dtype)  # type: ignore[union-attr]


def script_of(mode: Mode) -> str:
    """The file name of its trainer."""
    return f"{Path(mode.args.script).stem}.py"
