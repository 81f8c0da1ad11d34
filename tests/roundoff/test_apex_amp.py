"""`AmpPrecision` is a script of apex through the seam, and leaves no trace in what else runs in its process."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jobs
from apex_compat import amp
from roundoff import AmpPrecision, Precision
from roundoff.modes import STOCK

LEVELS = ["O1", "O2"]
STEPS, LR, MAX_NORM = 12, 0.5, 0.5


def network() -> nn.Module:
    torch.manual_seed(1)
    layers = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3), nn.LayerNorm(3)
    return nn.Sequential(*layers)


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    for k in range(STEPS):
        images = torch.randn(8, 1, 6, 6, generator=generator)
        images[0, 0, 0, 0] = 3e4 if k == 5 else 1.0  # an overflow in the middle, beside those of the first scale
        yield images, torch.randint(3, (8,), generator=generator)


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def by_the_seam(precision: Precision, model: nn.Module) -> list[Any]:
    """Return loss, loss scale and whether it was applied of each step, and the weights at the end."""
    found: list[Any] = []
    for images, labels in batches():
        model.zero_grad()
        with precision.forward():
            loss = F.cross_entropy(model(images).float(), labels)
        precision.backward(loss)
        result = precision.step(MAX_NORM)
        found.append((loss.item(), float(result.loss_scale), bool(result.applied)))
    return [*found, jobs.bits(list(model.state_dict().values()))]


def by_a_script(opt_level: str) -> list[Any]:
    """The same as a script of apex has it, with all that it leaves in the process; torch's functions come back."""
    model = network()
    model, optimizer = amp.initialize(model, sgd(model), opt_level=opt_level, verbosity=0)
    found: list[Any] = []
    try:
        for images, labels in batches():
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images).float(), labels)
            scale = amp._amp_state.loss_scalers[0].loss_scale()
            with amp.scale_loss(loss, optimizer) as scaled:
                scaled.backward()
            nn.utils.clip_grad_norm_(amp.master_params(optimizer), MAX_NORM)
            optimizer.step()
            found.append((loss.item(), scale, amp._amp_state.loss_scalers[0].loss_scale() >= scale))
        return [*found, jobs.bits(list(model.state_dict().values()))]
    finally:
        amp.initialize(nn.Linear(1, 1), enabled=False)


@pytest.mark.parametrize("opt_level", LEVELS)
def test_the_seam_is_a_script_of_apex_in_every_bit(opt_level: str) -> None:
    model = network()
    found = by_the_seam(AmpPrecision(model, sgd(model), opt_level), model)
    assert found == by_a_script(opt_level)
    applied = [was for *_, was in found[:-1]]
    assert True in applied
    assert False in applied


def trained(mode: str) -> list[Any]:
    model = network()
    return by_the_seam(STOCK[mode](model, lambda params: torch.optim.SGD(params, lr=LR, momentum=0.9)), model)


@pytest.mark.parametrize("opt_level", LEVELS)
def test_no_other_mode_of_the_process_is_changed(opt_level: str) -> None:
    """fp32 and autocast have their bits between two steps of apex's, and apex's have theirs between those."""
    functions = [F.linear, torch.conv2d, torch.Tensor.matmul, torch.nn.modules.rnn._VF]
    others = "fp32", "amp-fp16"
    before = [trained(mode) for mode in others]
    model = network()
    precision = AmpPrecision(model, sgd(model), opt_level)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    alone = network()
    expected = by_the_seam(AmpPrecision(alone, sgd(alone), opt_level), alone)
    assert [trained(mode) for mode in others] == before
    with precision.forward():
        assert model(torch.ones(2, 1, 6, 6)).dtype is torch.float32  # LayerNorm's, or cast by O2
        assert (F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.float16) == (opt_level == "O1")
        with precision.forward():
            pass
        assert (F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.float16) == (opt_level == "O1")
    model.load_state_dict(start)  # with the statistics of the batch norm
    assert by_the_seam(precision, model) == expected
    assert [F.linear, torch.conv2d, torch.Tensor.matmul, torch.nn.modules.rnn._VF] == functions
    assert not hasattr(amp._amp_state, "handle") or not amp._amp_state.handle.is_active()


def test_a_script_of_apex_keeps_its_state_beside_a_precision() -> None:
    """A probe in the middle of a script of O1: the script's casts and loss scale are its own before and after."""
    model = network()
    model, optimizer = amp.initialize(model, sgd(model), opt_level="O1", loss_scale=4.0, verbosity=0)
    try:
        for opt_level in LEVELS:
            other = network()
            by_the_seam(AmpPrecision(other, sgd(other), opt_level), other)
            assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.float16
            with amp.scale_loss(torch.ones(()), optimizer) as scaled:
                assert scaled.item() == 4.0
    finally:
        amp.initialize(nn.Linear(1, 1), enabled=False)
    assert F.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype is torch.float32


CHOICES: dict[str, tuple[Callable[[nn.Module], AmpPrecision], list[float]]] = {
    "static": (lambda model: AmpPrecision(model, sgd(model), "O2", static_scale=8.0), [8.0, 8.0]),
    "bfloat16": (lambda model: AmpPrecision(model, sgd(model), "O1", torch.bfloat16), [1.0, 1.0]),
    "dynamic": (lambda model: AmpPrecision(model, sgd(model), "O1", init_scale=2.0**30), [2.0**30, 2.0**29]),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_every_policy_of_the_loss_scale_skips_what_is_not_finite(choice: str) -> None:
    build, scales = CHOICES[choice]
    model = network()
    precision = build(model)
    before = jobs.bits(list(model.parameters()))
    for scale in scales:
        with precision.forward():
            loss = F.cross_entropy(model(torch.ones(4, 1, 6, 6)).float(), torch.zeros(4, dtype=torch.int64))
        precision.backward(loss)
        model[4].bias.grad[0] = math.nan  # type: ignore[index, union-attr]
        result = precision.step(MAX_NORM)
        assert (bool(result.applied), float(result.grad_norm), float(result.loss_scale)) == (False, math.inf, scale)
        model.zero_grad()
    assert jobs.bits(list(model.parameters())) == before
