"""The state dict of FP16_Optimizer, and what it is as a torch.optim.Optimizer."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from apex_compat import fp16_utils
from fp16_cases import (
    HALVES,
    OPTIMIZERS,
    loss_of,
    masters_of,
    mixed,
    mlp,
    problem,
    same,
    snapshot,
    train,
    wrap,
)

ARGS = {"init_scale": 2.0**12, "scale_window": 4, "max_loss_scale": 2.0**13}


def build(steps=0):
    network = mixed()
    optimizer = wrap(OPTIMIZERS["adamw"](network.parameters()), dynamic_loss_scale=True, dynamic_loss_args=ARGS)
    train(network, optimizer, steps)
    return network, optimizer


def test_the_state_is_plain():
    state = build(steps=3)[1].state_dict()
    flags = {"dynamic_loss_scale": True, "overflow": False, "first_closure_call_this_step": True}
    scaler = {"loss_scale": 2.0**12, "good_updates": 3, "scale_factor": 2.0, "scale_window": 4}
    assert list(state) == ["loss_scaler", *flags, "optimizer_state_dict", "fp32_from_fp16"]
    assert {key: state[key] for key in flags} == flags
    assert state["loss_scaler"] == scaler | {"min_loss_scale": None, "max_loss_scale": 2.0**13}
    assert [[t.shape for t in group] for group in state["fp32_from_fp16"]] == [[(5, 4), (5,)]]
    assert all(type(t) is torch.Tensor and not t.requires_grad for t in state["fp32_from_fp16"][0])


def test_the_kind_of_scale_comes_with_the_state():
    dynamic = build(steps=1)[1]
    static = wrap(OPTIMIZERS["adamw"](mixed().parameters()), static_loss_scale=64.0)
    before = static.state_dict()
    static.load_state_dict(dynamic.state_dict())
    assert (static.dynamic_loss_scale, static.loss_scale) == (True, 2.0**12)
    static.load_state_dict(before | {"optimizer_state_dict": static.state_dict()["optimizer_state_dict"]})
    assert (static.dynamic_loss_scale, static.loss_scale) == (False, 64.0)


def scaler(**changes):
    return lambda s: s | {"loss_scaler": s["loss_scaler"] | changes}


def replaced(**changes):
    return lambda s: s | changes


OTHER_GROUPS = torch.optim.AdamW(mlp()[0].parameters()).state_dict()
WRONG = {
    "not a dict": (lambda s: [s], TypeError, "state_dict is a list"),
    "a key missing": (lambda s: {k: v for k, v in s.items() if k != "overflow"}, ValueError, "overflow"),
    "a key too many": (replaced(more=1), ValueError, "more"),
    "a flag of another type": (replaced(overflow="no"), TypeError, "overflow.*no"),
    "a scaler object": (replaced(loss_scaler=object()), TypeError, r"apex_compat\.load_apex_checkpoint"),
    "a scaler with another key": (scaler(x=1), ValueError, "loss_scaler.*x"),
    "a scale of 0": (scaler(loss_scale=0.0), ValueError, "loss_scale.*0.0"),
    "a negative count": (scaler(good_updates=-1), ValueError, "good_updates.*-1"),
    "kinds that differ": (replaced(dynamic_loss_scale=False), ValueError, "dynamic_loss_scale"),
    "masters of another shape": (
        replaced(fp32_from_fp16=[[torch.zeros(5, 3), torch.zeros(5)]]),
        ValueError,
        r"fp32_from_fp16.*\(5, 3\).*\(5, 4\)",
    ),
    "too few masters": (replaced(fp32_from_fp16=[[]]), ValueError, "fp32_from_fp16"),
    "another number of groups": (replaced(fp32_from_fp16=[]), ValueError, "0 groups, not 1"),
    "masters that are no tensors": (replaced(fp32_from_fp16=[[1, 2]]), TypeError, "tensors only"),
    "masters that are no list": (replaced(fp32_from_fp16=3), TypeError, "list of lists"),
    "no optimizer state": (replaced(optimizer_state_dict={}), TypeError, "optimizer_state_dict"),
    "other groups": (
        replaced(optimizer_state_dict=OTHER_GROUPS),
        ValueError,
        r"groups of \[2\] parameters; the optimizer has \[4\]",
    ),
    "momentum of another shape": (
        lambda s: s | {"optimizer_state_dict": s["optimizer_state_dict"] | {"state": {3: {"exp_avg": torch.zeros(7)}}}},
        ValueError,
        r"exp_avg of shape \(7,\) for parameter 3.*\(3,\)",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_state_is_refused_and_nothing_changes(case):
    change, error, message = WRONG[case]
    network, optimizer = build(steps=3)
    before = snapshot(network, optimizer, optimizer.state_dict())
    with pytest.raises(error, match=message):
        optimizer.load_state_dict(change(optimizer.state_dict()))
    assert same(before, snapshot(network, optimizer, optimizer.state_dict()))


def test_a_dynamic_state_needs_the_check():
    optimizer = wrap(torch.optim.AdamW(mixed().parameters()), check_overflow=False)
    with pytest.raises(ValueError, match="check_overflow"):
        optimizer.load_state_dict(build()[1].state_dict())


def test_its_state_can_be_copied_and_itself_cannot():
    network, optimizer = build(steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    kept = snapshot(state)
    train(network, optimizer, steps=1)
    assert same(kept, snapshot(state))
    for copied in (pickle.dumps, copy.deepcopy):
        with pytest.raises(RuntimeError, match=r"FP16_Optimizer cannot be pickled.*state_dict"):
            copied(optimizer)


def test_it_is_an_optimizer(capsys):
    inner = OPTIMIZERS["momentum"](mlp(torch.float16).parameters())
    optimizer = fp16_utils.FP16_Optimizer(inner, dynamic_loss_scale=True)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lr: 0.1" in repr(optimizer)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in masters_of(optimizer))
    optimizer.param_groups = groups = [dict(inner.param_groups[0], lr=0.5)]
    assert inner.param_groups is groups
    assert capsys.readouterr() == ("", "")


def test_state_made_before_wrapping_moves_to_the_masters():
    network = mlp(torch.bfloat16)
    inner = OPTIMIZERS["adamw"](network.parameters())
    loss_of(network, *problem()).backward()
    inner.step()
    before = [state["exp_avg"].float() for state in inner.state.values()]
    optimizer = wrap(inner)
    assert set(optimizer.state) == set(masters_of(optimizer))
    for state, exp_avg in zip(optimizer.state.values(), before, strict=True):
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], exp_avg)
        assert state["step"].item() == 1
    train(network, optimizer, steps=1)
    assert all(state["step"].item() == 2 for state in optimizer.state.values())


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize(("name", "more"), [("NAdam", {"eps": 1e-3}), ("ASGD", {}), ("Rprop", {})])
def test_state_moves_to_the_masters_of_several_groups_unrounded(name, more, half):
    """mu_product (NAdam), eta and mu (ASGD) are fp32 beside half weights, and were rounded while a group waited."""
    network = mlp(half)
    params = list(network.parameters())
    inner = getattr(torch.optim, name)([{"params": [param]} for param in params], lr=0.01, **more)
    for i in range(3):
        inner.zero_grad()
        loss_of(network, *problem(i)).backward()
        inner.step()
    before = [{key: value.detach().clone() for key, value in inner.state[param].items()} for param in params]
    optimizer = wrap(inner)
    for master, kept in zip(masters_of(optimizer), before, strict=True):
        for key, value in optimizer.state[master].items():
            assert torch.equal(value.double(), kept[key].double()), key
            assert value.dtype == torch.float32


def test_schedulers_of_other_kinds():
    optimizer = wrap(OPTIMIZERS["sgd"](mlp(torch.float16).parameters()))
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    LambdaLR(optimizer, lambda epoch: 3.0)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)  # 3 x the lr it started from
    scheduler = StepLR(optimizer, 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_add_param_group():
    network = mixed()
    layers = [network[0], network[3]]
    optimizer = wrap(OPTIMIZERS["momentum"](layers[0].parameters()), static_loss_scale=64.0)
    train(network, optimizer, steps=1)
    optimizer.add_param_group({"params": layers[1].parameters(), "lr": 0.5})
    extra = nn.Parameter(torch.ones(2, dtype=torch.bfloat16))
    optimizer.add_param_group({"params": extra})
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.5, 0.1]
    assert [len(group) for group in optimizer.state_dict()["fp32_from_fp16"]] == [2, 0, 1]
    before = snapshot(layers[1])
    optimizer.zero_grad()
    optimizer.backward(loss_of(network, *problem()) + extra.float().sum())
    optimizer.step()
    assert not same(before, snapshot(layers[1]))
    assert extra.tolist() == pytest.approx([1 - 0.19] * 2, abs=0.01)
    with pytest.raises(ValueError, match="of another group"):
        optimizer.add_param_group({"params": [network[0].weight]})
    with pytest.raises(TypeError, match="float64"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1, dtype=torch.float64))]})
    assert len(optimizer.param_groups) == 3


def test_named_parameters_can_be_wrapped():
    network = mlp(torch.float16)
    optimizer = wrap(OPTIMIZERS["sgd"](network.named_parameters()))
    train(network, optimizer, steps=1)
    assert optimizer.param_groups[0]["param_names"] == [name for name, _ in network.named_parameters()]
