"""apex_compat.amp's loss scales, counters, skipped steps and weights, against a model in pure Python."""

import itertools
import math

import pytest
import torch
from torch import nn

from amp_cases import INF, NAN, amp, backward, initialize, torch_as_it_was  # noqa: F401
from amp_schedule import GRADIENTS, ITERATIONS, LARGEST, LOSSES, LR, SMALLEST, START, WAYS, Model

PLACES = list(itertools.product(range(ITERATIONS), range(LOSSES)))
PATTERNS = [
    {},
    *({place: INF} for place in PLACES),
    {(1, 0): NAN, (1, 2): INF},
    {(1, 1): -INF, (1, 2): NAN, (2, 0): INF},
    {(i, 2): INF for i in range(3)},
]
FEW = [PATTERNS[0], PATTERNS[6], *PATTERNS[-3:]]


class Weight(nn.Module):
    """One weight of 1, and no bias."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False)
        nn.init.ones_(self.layer.weight)

    def forward(self, x):
        return self.layer(x)


def build(level, way, device):
    models = [Weight().to(device) for _ in range(2)]
    optimizers = [torch.optim.SGD(model.parameters(), lr=LR) for model in models]
    models, optimizers = initialize(
        models,
        optimizers,
        opt_level=level,
        loss_scale="dynamic",
        num_losses=LOSSES if way.own_scalers else 1,
        min_loss_scale=SMALLEST,
        max_loss_scale=LARGEST,
        verbosity=1,
    )
    for scaler in amp._amp_state.loss_scalers:
        scaler._unskipped = START
    return models, optimizers


def state(models):
    scalers = [(s.loss_scale(), s._unskipped) for s in amp._amp_state.loss_scalers]
    return scalers, [model.layer.weight.item() for model in models]


def alike(first, second):
    """Say whether two states are equal; nan equals nan."""
    weights = zip(first[1], second[1], strict=True)
    return first[0] == second[0] and all(a == b or (math.isnan(a) and math.isnan(b)) for a, b in weights)


def follow(level, way, pattern, device, capsys):
    """Assert that amp does what the model says, at each backward pass and step of a pattern of overflows."""
    models, optimizers = build(level, way, device)
    expected = Model(way)
    capsys.readouterr()
    for i in range(ITERATIONS):
        for optimizer in optimizers:
            optimizer.zero_grad()
        for loss in range(LOSSES):
            factor = pattern.get((i, loss), 1.0)
            used = way.optimizers(loss)
            # Not the input but the loss has the factor: at 2**16 a gradient of 1 would overflow in half.
            x = torch.ones(1, 1, device=device)
            value = sum(models[k](x).float().sum() for k in used) * GRADIENTS[loss] * factor
            delay = {way.delayed: True} if way.is_delayed(loss) else {}
            listed = [optimizers[k] for k in used]
            backward(value, listed[0] if len(listed) == 1 else listed, loss_id=way.scaler(loss), **delay)
            expected.backward(loss, factor)
            assert alike(state(models), expected.state()), (pattern, i, loss)
        for optimizer in optimizers:
            optimizer.step()
        expected.step()
        assert alike(state(models), expected.state()), (pattern, i, "step")
    assert capsys.readouterr().out.splitlines() == expected.printed, pattern


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_scales_skips_and_weights_follow_the_model(level, way, device, capsys):
    patterns = PATTERNS if level in {"O1", "O2"} else FEW
    if way.delayed == "delay_overflow_check":  # a delayed check lets an inf pass unless the last loss has one too
        patterns = [p for p in patterns if all(loss == LOSSES - 1 for _, loss in p)]
    for pattern in patterns:
        follow(level, way, pattern, device, capsys)


@pytest.mark.parametrize("level", ["O1", "O2"])
def test_an_overflow_that_nobody_checks_reaches_the_weights(level):
    models, optimizers = build(level, WAYS["one scaler"], "cpu")
    x = torch.ones(1, 1)
    backward(models[0](x).sum() * INF, optimizers[0], delay_overflow_check=True)
    assert state(models)[0] == [(2.0**16, START)]
    optimizers[0].step()
    assert not math.isfinite(models[0].layer.weight.item())


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_a_static_scale_counts_and_applies_inf(level):
    model = Weight()
    model, optimizer = initialize(model, torch.optim.SGD(model.parameters(), lr=LR), opt_level=level, loss_scale=128.0)
    for i in range(3):
        optimizer.zero_grad()
        backward(model(torch.ones(1, 1)).float().sum() * GRADIENTS[0], optimizer)
        optimizer.step()
        assert model.layer.weight.item() == 1.0 - LR * GRADIENTS[0] * (i + 1)
    assert state([model])[0] == [(128.0, 3)]
    backward(model(torch.ones(1, 1)).sum() * INF, optimizer)
    assert state([model])[0] == [(128.0, 4)]
    optimizer.step()
    assert not math.isfinite(model.layer.weight.item())


@pytest.mark.parametrize(
    ("bounds", "start", "after"),
    [
        ({}, 2.0**16, 2.0**15),
        ({"max_loss_scale": 2.0**10}, 2.0**10, 2.0**9),
        ({"min_loss_scale": 2.0**16}, 2.0**16, 2.0**16),
        ({"min_loss_scale": 2.0**17}, 2.0**16, 2.0**17),  # not raised at the start; the first overflow doubles it
    ],
)
def test_bounds_of_a_dynamic_scale(bounds, start, after):
    model, optimizer = o1_weight(**bounds)
    (scaler,) = amp._amp_state.loss_scalers
    assert scaler.loss_scale() == start
    backward(model(torch.ones(1, 1)).sum() * INF, optimizer)
    assert scaler.loss_scale() == after


def o1_weight(**kwargs):
    model = Weight()
    return initialize(model, torch.optim.SGD(model.parameters(), lr=LR), **kwargs)
