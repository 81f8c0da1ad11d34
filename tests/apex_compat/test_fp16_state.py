"""Saving at any step and going on as if nothing had happened."""

import io

import pytest
import torch
from torch.optim.lr_scheduler import StepLR

from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot, train, wrap

STEPS = 30
OVERFLOWS = {0, 1, 7, 16, 17, 25}
ARGS = {"init_scale": 2.0**12, "scale_window": 4, "max_loss_scale": 2.0**13}


def build():
    network = mixed()
    inner = torch.optim.AdamW(network.parameters(), lr=0.01)
    optimizer = wrap(inner, dynamic_loss_scale=True, dynamic_loss_args=ARGS)
    return network, optimizer, StepLR(optimizer, 5, gamma=0.9)


def run(network, optimizer, scheduler, steps):
    """Train the given steps; return the loss scale after each."""
    scales = []
    for i in steps:
        optimizer.zero_grad()
        factor = float("inf") if i in OVERFLOWS else 1.0
        optimizer.backward(loss_of(network, *problem(i)) * factor)
        optimizer.clip_master_grads(0.5)
        optimizer.step()
        scheduler.step()
        scales.append(optimizer.loss_scale)
    return scales


def through_a_file(*states):
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


def test_resume_after_any_step_is_bit_exact():
    reference = build()
    saved, scales = [], []
    for i in range(STEPS):
        saved.append(through_a_file(*(part.state_dict() for part in reference)))
        scales += run(*reference, [i])
    assert len(set(scales)) >= 3  # the scale did move, both ways
    expected = snapshot(*reference[:2])
    for start, states in enumerate(saved):
        resumed = build()
        # The half weights alone would not do: the masters must win over them.
        with torch.no_grad():
            resumed[0][0].weight.add_(1.0)
        resumed[0][3].load_state_dict({k[2:]: v for k, v in states[0].items() if k.startswith("3.")})
        for part, state in zip(resumed[1:], states[1:], strict=True):
            part.load_state_dict(state)
        assert run(*resumed, range(start, STEPS)) == scales[start:]
        assert same(expected, snapshot(*resumed[:2])), start


def test_the_state_is_plain():
    network, optimizer, _ = build()
    train(network, optimizer, steps=3)
    state = optimizer.state_dict()
    assert list(state) == [
        "loss_scaler",
        "dynamic_loss_scale",
        "overflow",
        "first_closure_call_this_step",
        "optimizer_state_dict",
        "fp32_from_fp16",
    ]
    assert state["loss_scaler"] == {
        "loss_scale": 2.0**12,
        "good_updates": 3,
        "scale_factor": 2.0,
        "scale_window": 4,
        "min_loss_scale": None,
        "max_loss_scale": 2.0**13,
    }
    assert [[t.shape for t in group] for group in state["fp32_from_fp16"]] == [[(5, 4), (5,)]]
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in state["fp32_from_fp16"][0])
    (loaded,) = through_a_file(state)
    assert same(snapshot(state), snapshot(loaded))


def test_the_kind_of_scale_comes_with_the_state():
    network, dynamic, _ = build()
    train(network, dynamic, steps=1)
    static = wrap(torch.optim.AdamW(mixed().parameters(), lr=0.01), static_loss_scale=64.0)
    before = static.state_dict()
    static.load_state_dict(dynamic.state_dict())
    assert static.dynamic_loss_scale
    assert static.loss_scale == 2.0**12
    static.load_state_dict(before | {"optimizer_state_dict": static.state_dict()["optimizer_state_dict"]})
    assert not static.dynamic_loss_scale
    assert static.loss_scale == 64.0


def test_overflow_is_restored():
    network, optimizer, scheduler = build()
    run(network, optimizer, scheduler, [0])
    other = build()[1]
    other.load_state_dict(optimizer.state_dict())
    assert other.overflow
    assert other.found_inf.item() == 1.0


def changed(state, **changes):
    return {**state, **changes}


WRONG = {
    "not a dict": (lambda s: [s], TypeError, "state_dict is a list"),
    "a key missing": (lambda s: {k: v for k, v in s.items() if k != "overflow"}, ValueError, "overflow"),
    "a key too many": (lambda s: changed(s, more=1), ValueError, "more"),
    "a flag of another type": (lambda s: changed(s, overflow="no"), TypeError, "overflow.*no"),
    "a scaler object": (lambda s: changed(s, loss_scaler=object()), TypeError, "load_apex_checkpoint"),
    "a scaler with another key": (
        lambda s: changed(s, loss_scaler={**s["loss_scaler"], "x": 1}),
        ValueError,
        "loss_scaler.*x",
    ),
    "a scale of 0": (
        lambda s: changed(s, loss_scaler={**s["loss_scaler"], "loss_scale": 0.0}),
        ValueError,
        "loss_scale.*0.0",
    ),
    "a negative count": (
        lambda s: changed(s, loss_scaler={**s["loss_scaler"], "good_updates": -1}),
        ValueError,
        "good_updates.*-1",
    ),
    "kinds that differ": (lambda s: changed(s, dynamic_loss_scale=False), ValueError, "dynamic_loss_scale"),
    "masters of another shape": (
        lambda s: changed(s, fp32_from_fp16=[[torch.zeros(5, 3), torch.zeros(5)]]),
        ValueError,
        r"fp32_from_fp16.*\(5, 3\).*\(5, 4\)",
    ),
    "too few masters": (lambda s: changed(s, fp32_from_fp16=[[]]), ValueError, "fp32_from_fp16"),
    "another number of groups": (lambda s: changed(s, fp32_from_fp16=[]), ValueError, "0 groups, not 1"),
    "masters that are no tensors": (lambda s: changed(s, fp32_from_fp16=[[1, 2]]), TypeError, "tensors only"),
    "masters that are no list": (lambda s: changed(s, fp32_from_fp16=3), TypeError, "list of lists"),
    "no optimizer state": (lambda s: changed(s, optimizer_state_dict={}), TypeError, "optimizer_state_dict"),
    "other groups": (
        lambda s: changed(s, optimizer_state_dict=torch.optim.AdamW(mlp()[0].parameters()).state_dict()),
        ValueError,
        r"groups of \[2\] parameters; the optimizer has \[4\]",
    ),
    "momentum of another shape": (
        lambda s: changed(
            s,
            optimizer_state_dict={
                **s["optimizer_state_dict"],
                "state": {3: {"exp_avg": torch.zeros(7)}},
            },
        ),
        ValueError,
        r"exp_avg of shape \(7,\) for parameter 3.*\(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_state_is_refused_and_nothing_changes(case):
    change, error, message = WRONG[case]
    network, optimizer, scheduler = build()
    run(network, optimizer, scheduler, range(3))
    before = snapshot(network, optimizer, optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    assert same(before, snapshot(network, optimizer, optimizer.state_dict()))


def test_a_dynamic_state_needs_the_check():
    optimizer = wrap(torch.optim.AdamW(mixed().parameters()), check_overflow=False)
    with pytest.raises(ValueError, match="check_overflow"):
        optimizer.load_state_dict(build()[1].state_dict())
