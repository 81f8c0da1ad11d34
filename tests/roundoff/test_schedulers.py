"""Learning rate schedulers of torch over every mode: what they say reaches the weights, and a skip is no mistake."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import (
    ConstantLR,
    CosineAnnealingLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from apex_compat.fp16_utils import FP16_Optimizer
from roundoff import Autocast, Precision, WrappedOptimizer
from roundoff.modes import STOCK, Build, MakeOptimizer

STEPS = 6
GRADIENT = torch.tensor([0.5, -0.25, 0.125, 0.0])
"""Exact in half, times 2**16 too; so the masters of every mode move as one fp32 weight does."""


class Slope(nn.Module):
    """A model whose loss has the same gradient everywhere."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self) -> torch.Tensor:
        return (self.weight.float() * GRADIENT).sum()


def wrapped(**options: Any) -> Build:
    def build(model: nn.Module, optimizer: MakeOptimizer) -> Precision:
        return WrappedOptimizer(FP16_Optimizer(optimizer(list(model.half().parameters())), verbose=False, **options))

    return build


def by_hand(model: nn.Module, optimizer: MakeOptimizer) -> Precision:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    return Autocast(optimizer(list(model.parameters())), scaler, "cpu", torch.float16, static_scale=8.0)


class OfApex:
    """The members of apex's FP16_Optimizer that the seam uses, over this project's; it is no torch optimizer."""

    def __init__(self, inner: FP16_Optimizer) -> None:
        self.optimizer, self._inner = inner.optimizer, inner
        self.backward, self.clip_master_grads = inner.backward, inner.clip_master_grads
        self.update_master_grads, self.loss_scale = inner.update_master_grads, 128.0

    param_groups = property(lambda self: self.optimizer.param_groups)

    def step(self) -> None:
        if not self._inner.overflow:
            self._inner.step()


def of_apex(model: nn.Module, optimizer: MakeOptimizer) -> Precision:
    inner = FP16_Optimizer(optimizer(list(model.half().parameters())), static_loss_scale=128.0, verbose=False)
    return WrappedOptimizer(OfApex(inner))


MODES: dict[str, Build] = {
    **{name: STOCK[name] for name in STOCK if name != "bf16-weights"},
    "fp16-optimizer": wrapped(static_loss_scale=128.0),
    "fp16-optimizer-dynamic": wrapped(dynamic_loss_scale=True),
    "amp-fp16-static": by_hand,
    "apex": of_apex,
}
CASES = [*((mode, False) for mode in MODES), *((mode, True) for mode in ("masters-fp16", "fp16-optimizer", "amp-fp16"))]
"""Mode, and whether the optimizer is fused: such a one is called for a skipped step too, and skips on the device."""
SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda optimizer: StepLR(optimizer, 2, 0.5),
    "CosineAnnealingLR": lambda optimizer: CosineAnnealingLR(optimizer, STEPS),
    "OneCycleLR": lambda optimizer: OneCycleLR(optimizer, 1.0, STEPS + 1),  # which moves the momentum too
    "ReduceLROnPlateau": lambda optimizer: ReduceLROnPlateau(optimizer, patience=1),
    "LambdaLR": lambda optimizer: LambdaLR(optimizer, lambda step: 1 / (1 + step)),
    "SequentialLR": lambda optimizer: SequentialLR(
        optimizer, [ConstantLR(optimizer, 0.25, 2), StepLR(optimizer, 1, 0.5)], [2]
    ),
}


def sgd(parameters: list[nn.Parameter], fused: bool = False) -> Optimizer:
    return SGD(parameters, lr=0.5, momentum=0.875, fused=fused)


def trained(optimizer: Optimizer, scheduler: Any, step: Callable[[int], None]) -> list[tuple[Any, ...]]:
    """Learning rate and momentum of each step, and the weights after it."""
    seen = []
    for k in range(STEPS):
        (group,) = optimizer.param_groups
        used = (group["lr"], group["momentum"])
        step(k)
        seen.append((*used, group["params"][0].tolist()))
        scheduler.step(*[1.0] * isinstance(scheduler, ReduceLROnPlateau))
    return seen


def plain(scheduler: str, fused: bool) -> list[tuple[Any, ...]]:
    """An fp32 weight whose first gradient is 0."""
    weight = nn.Parameter(torch.ones(4))
    optimizer = sgd([weight], fused)

    def step(k: int) -> None:
        weight.grad = GRADIENT.clone() if k else torch.zeros(4)
        optimizer.step()

    return trained(optimizer, SCHEDULERS[scheduler](optimizer), step)


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # of the SequentialLR of torch 2.6 itself
@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize(("mode", "fused"), CASES)
def test_the_rate_of_each_step_is_the_schedulers(mode: str, fused: bool, scheduler: str) -> None:
    """The first step is skipped, as an initial loss scale often has it."""
    model = Slope()
    precision = MODES[mode](model, lambda parameters: sgd(parameters, fused))
    assert isinstance(precision.optimizer, Optimizer)

    def step(k: int) -> None:
        model.zero_grad()
        with precision.forward():
            loss = model()
        precision.backward(loss)
        if k == 0 and model.weight.grad is not None:
            model.weight.grad[1] = torch.inf
        assert precision.step(100.0).applied == (k > 0)

    found = trained(precision.optimizer, SCHEDULERS[scheduler](precision.optimizer), step)
    assert found == plain(scheduler, fused)
    assert len({lr for lr, *_ in found}) > 1
    assert model.weight.tolist() == torch.tensor(found[-1][-1]).to(model.weight.dtype).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_a_loop_that_never_steps_is_still_warned(mode: str) -> None:
    scheduler = StepLR(MODES[mode](Slope(), sgd).optimizer, 1)
    with pytest.warns(UserWarning, match=r"Detected call of `lr_scheduler\.step\(\)` before `optimizer\.step\(\)`"):
        scheduler.step()
