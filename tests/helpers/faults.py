"""Numerical faults at chosen steps of a run, put in through hooks: the trainers know nothing of them.

A fault is (place, value). The places, of which each one takes its first element or first word:

"loss": the loss, times the value; "loss-offset": the loss, plus the value, which leaves its gradient as it is;
"encoder", "rnn": what these layers return for one word; "hidden": the state that the next batch starts from;
"score": one logit; "scores": all logits of one word; or the name of a parameter: one element of its gradient.
"""

import importlib
from typing import Any

import pytest
import torch.nn.functional as F
from torch import Tensor

from lm.model.decoder_loss import decoder_loss
from lm.model.kernels import linear
from lm.model.language_model import RNNModel
from moments import AfterStep, after_steps

Plan = dict[int, tuple[str, float]]
"""The faults by step, from step 2 on: before the first step every trainer tries its model."""


class Faults:
    """Puts the faults of `plan` into the training steps of `model`.

    Attributes:
        step: the number of the step that runs; whoever trains counts it up.
    """

    def __init__(self, plan: Plan, model: RNNModel, monkeypatch: pytest.MonkeyPatch) -> None:
        assert min(plan, default=2) > 1
        self.plan = plan
        self.model = model
        self.step = 1
        self.parameters = dict(model.named_parameters())
        model.encoder.register_forward_hook(lambda _, __, out: self.at("encoder", out, (0, 0)))
        model.rnn.register_forward_hook(self._after_rnn)
        model.register_forward_hook(self._after_model)
        self.cross_entropy = F.cross_entropy
        monkeypatch.setattr(F, "cross_entropy", lambda *args: self._after_loss(self.cross_entropy(*args)))
        monkeypatch.setattr("lm.model.language_model.decoder_loss", self._decoder_loss)

    def value(self, place: str) -> float | None:
        """What is to be put there in this step."""
        fault = self.plan.get(self.step) if self.model.training else None
        return fault[1] if fault is not None and fault[0] == place else None

    def at(self, place: str, tensor: Tensor, index: tuple[int, ...]) -> Tensor:
        """`tensor`, plus the value at `index` if this is the place; a gradient goes through as it is."""
        value = self.value(place)
        if value is not None:
            tensor = tensor.clone()
            tensor[index] += value
        return tensor

    def _after_rnn(self, rnn: Any, inputs: Any, outputs: Any) -> Any:
        output, hidden = outputs
        if isinstance(hidden, Tensor):
            hidden = self.at("hidden", hidden, (0, 0, 0))
        else:
            hidden = tuple(self.at("hidden", state, (0, 0, 0)) for state in hidden)
        return self.at("rnn", output, (0, 0)), hidden

    def _after_model(self, model: Any, inputs: Any, outputs: Any) -> Any:
        scores, hidden = outputs
        if scores.dim() == 0:
            return self._after_loss(scores), hidden
        return self.at("scores", self.at("score", scores, (0, 0, 0)), (0, 0)), hidden

    def _decoder_loss(self, *args: Tensor) -> Tensor:
        """That of the model, but in a step with a fault in its logits the plain one, which lets them be reached."""
        if self.value("score") is None and self.value("scores") is None:
            return decoder_loss(*args)
        *factors, targets = args
        logits = self.at("scores", self.at("score", linear(*factors), (0, 0)), (0,))
        return self.cross_entropy(logits.float(), targets)

    def _after_loss(self, loss: Tensor) -> Tensor:
        factor, offset = self.value("loss"), self.value("loss-offset")
        return loss * factor if factor is not None else loss if offset is None else loss + offset

    def spoil_gradient(self) -> None:
        """To be called between the backward pass and the step."""
        name, value = self.plan.get(self.step, ("", 0.0))
        if name in self.parameters:
            self.parameters[name].grad.view(-1)[0] = value


def put_into(
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    plan: Plan,
    after_step: AfterStep,
) -> None:
    """Put `plan` into the next run of `script`, and let `after_step` see each step; see `moments.after_steps`."""
    faults: list[Faults] = []

    def begin(model: RNNModel) -> None:
        faults.append(Faults(plan, model, monkeypatch))

    def act(step: int, *rest: Any) -> None:
        after_step(step, *rest)
        faults[0].step = step + 1

    fit = after_steps(script, act, lambda: faults[0].spoil_gradient(), begin)
    monkeypatch.setattr(importlib.import_module(script), "fit", fit)
