"""FP16_Optimizer as a torch.optim.Optimizer: any optimizer inside, schedulers and hooks outside."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau, StepLR

from apex_compat import fp16_utils
from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot, train, wrap

OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw),
    "momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "dampened": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, amsgrad=True, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, **kw),
}
VARIANTS = [
    (name, implementation)
    for name in OPTIMIZERS
    for implementation in ("default", "foreach", "fused")
    if (name, implementation) != ("rmsprop", "fused")  # torch has none
]


def build(name, implementation, params):
    return OPTIMIZERS[name](params, **({} if implementation == "default" else {implementation: True}))


@pytest.mark.parametrize(("name", "implementation"), VARIANTS)
def test_every_optimizer_trains_fp32_as_without_the_wrapper(name, implementation):
    plain, wrapped = mlp(), mlp()
    control = build(name, implementation, plain.parameters())
    optimizer = wrap(build(name, implementation, wrapped.parameters()), static_loss_scale=2.0**10)
    for i in range(6):
        control.zero_grad()
        loss_of(plain, *problem(i)).backward()
        control.step()
        optimizer.zero_grad()
        optimizer.backward(loss_of(wrapped, *problem(i)))
        optimizer.step()
    assert same(snapshot(plain, control), snapshot(wrapped, optimizer))


@pytest.mark.parametrize("first", [0, 2], ids=["at once", "later"])
@pytest.mark.parametrize(("name", "implementation"), VARIANTS)
def test_skipped_steps_leave_no_trace(name, implementation, first):
    control, skipping = mixed(), mixed()
    optimizers = [
        wrap(build(name, implementation, network.parameters()), static_loss_scale=2.0**7)
        for network in (control, skipping)
    ]
    for i in range(5):
        if i == first:
            for _ in range(2):
                before = snapshot(skipping)
                optimizers[1].zero_grad()
                optimizers[1].backward(loss_of(skipping, *problem(i)) * float("inf"))
                optimizers[1].step()
                assert same(before, snapshot(skipping))
        for network, optimizer in zip((control, skipping), optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.backward(loss_of(network, *problem(i)))
            optimizer.step()
    assert same(snapshot(control, optimizers[0]), snapshot(skipping, optimizers[1]))


def test_a_skipped_first_fused_step_cleans_its_momentum(monkeypatch):
    # Make sure that there is something to clean, whatever the allocator hands out.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: empty_like(t, **kw).fill_(float("nan")))
    weight = nn.Parameter(torch.ones(3))
    optimizer = wrap(torch.optim.SGD([weight], lr=1.0, momentum=0.5, fused=True))
    for coefficient in (float("inf"), 2.0):
        optimizer.zero_grad()
        optimizer.backward(weight.sum() * coefficient)
        optimizer.step()
    assert weight.tolist() == [-1.0] * 3
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [2.0] * 3


def test_it_is_an_optimizer():
    network = mlp(torch.float16)
    inner = OPTIMIZERS["momentum"](network.parameters())
    optimizer = wrap(inner)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.optimizer is inner
    assert optimizer.param_groups is inner.param_groups
    assert optimizer.state is inner.state
    assert optimizer.defaults is inner.defaults
    assert "lr: 0.1" in repr(optimizer)
    assert all(p.dtype == torch.float32 and p.is_leaf for p in optimizer.param_groups[0]["params"])
    optimizer.param_groups = groups = [dict(inner.param_groups[0], lr=0.5)]
    assert inner.param_groups is groups


def test_state_made_before_wrapping_moves_to_the_masters():
    plain, wrapped = mlp(torch.bfloat16), mlp(torch.bfloat16)
    optimizers = []
    for network in (plain, wrapped):
        inner = OPTIMIZERS["adamw"](network.parameters())
        loss_of(network, *problem()).backward()
        inner.step()
        inner.zero_grad()
        optimizers.append(inner)
    before = [s["exp_avg"].float() for s in optimizers[0].state.values()]
    optimizer = wrap(optimizers[1])
    assert set(optimizer.state) == set(optimizer.param_groups[0]["params"])
    for state, exp_avg in zip(optimizer.state.values(), before, strict=True):
        assert state["exp_avg"].dtype == torch.float32
        assert torch.equal(state["exp_avg"], exp_avg)
        assert state["step"].item() == 1
    train(wrapped, optimizer, steps=1)


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("attach", ["wrapper", "inner"])
@pytest.mark.parametrize("overflow", [False, True])
def test_schedulers_follow_without_warnings(attach, overflow, fused):
    network = mlp(torch.float16)
    inner = torch.optim.SGD(network.parameters(), lr=1.0, fused=fused)
    scheduler = StepLR(inner, 1, gamma=0.5) if attach == "inner" else None
    optimizer = wrap(inner)
    scheduler = scheduler or StepLR(optimizer, 1, gamma=0.5)
    for i in range(3):
        optimizer.zero_grad()
        bad = float("inf") if overflow and i == 0 else 1.0
        optimizer.backward(loss_of(network, *problem(i)) * bad)
        optimizer.step()
        scheduler.step()  # a wrong-order warning is an error here
        assert optimizer.param_groups[0]["lr"] == inner.param_groups[0]["lr"] == 0.5 ** (i + 1)


def test_a_scheduler_that_is_stepped_too_early_still_warns():
    scheduler = StepLR(wrap(OPTIMIZERS["sgd"](mlp().parameters())), 1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_reduce_on_plateau_and_lambda_schedulers():
    optimizer = wrap(OPTIMIZERS["sgd"](mlp(torch.float16).parameters()))
    plateau = ReduceLROnPlateau(optimizer, factor=0.5, patience=0)
    plateau.step(1.0)
    plateau.step(2.0)
    assert optimizer.param_groups[0]["lr"] == 0.05
    LambdaLR(optimizer, lambda epoch: 3.0)
    assert optimizer.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)  # 3 x the lr it started from


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


def test_hooks_run():
    network = mlp(torch.float16)
    optimizer = wrap(OPTIMIZERS["sgd"](network.parameters()))
    seen = []
    optimizer.register_step_pre_hook(lambda opt, args, kwargs: seen.append(("pre", opt)))
    optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("post", opt)))
    optimizer.optimizer.register_step_post_hook(lambda opt, args, kwargs: seen.append(("inner", opt)))
    train(network, optimizer, steps=1)
    assert seen == [("pre", optimizer), ("inner", optimizer.optimizer), ("post", optimizer)]
    optimizer.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
    optimizer.register_state_dict_post_hook(lambda opt, state: {**state, "extra": 1})
    optimizer.register_load_state_dict_pre_hook(lambda opt, state: {k: v for k, v in state.items() if k != "extra"})
    optimizer.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
    state = optimizer.state_dict()
    assert state["extra"] == 1
    optimizer.load_state_dict(state)
    assert seen[3:] == ["saving", "loaded"]


def test_its_state_can_be_copied_and_itself_cannot():
    network = mlp(torch.float16)
    optimizer = wrap(OPTIMIZERS["adam"](network.parameters()))
    train(network, optimizer, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    kept = snapshot(state)
    train(network, optimizer, steps=1)
    assert same(kept, snapshot(state))
    with pytest.raises(RuntimeError, match="state_dict"):
        pickle.dumps(optimizer)
    with pytest.raises(RuntimeError, match="state_dict"):
        copy.deepcopy(optimizer)


def test_construction_is_silent(capsys):
    fp16_utils.FP16_Optimizer(OPTIMIZERS["sgd"](mlp(torch.float16).parameters()), dynamic_loss_scale=True)
    assert capsys.readouterr() == ("", "")
