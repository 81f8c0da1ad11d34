"""The names, signatures and private attributes of apex.amp that scripts use, and its legacy handle."""

import importlib
import inspect

import pytest
import torch
from torch import nn

from amp_cases import INF, OPTIMIZERS, amp, backward, changed, initialize, mlp, torch_as_it_was  # noqa: F401

NONE = inspect.Parameter.empty
SIGNATURES = {
    "initialize": {
        "models": NONE,
        "optimizers": None,
        "enabled": True,
        "opt_level": "O1",
        "cast_model_type": None,
        "patch_torch_functions": None,
        "keep_batchnorm_fp32": None,
        "master_weights": None,
        "loss_scale": None,
        "cast_model_outputs": None,
        "num_losses": 1,
        "verbosity": 1,
        "min_loss_scale": None,
        "max_loss_scale": 2.0**24,
    },
    "scale_loss": {
        "loss": NONE,
        "optimizers": NONE,
        "loss_id": 0,
        "model": None,
        "delay_unscale": False,
        "delay_overflow_check": False,
    },
    "master_params": {"optimizer": NONE},
    "state_dict": {"destination": None},
    "load_state_dict": {"state_dict": NONE},
    "disable_casts": {},
    "half_function": {"fn": NONE},
    "float_function": {"fn": NONE},
    "promote_function": {"fn": NONE},
    "register_half_function": {"module": NONE, "name": NONE},
    "register_float_function": {"module": NONE, "name": NONE},
    "register_promote_function": {"module": NONE, "name": NONE},
    "init": {
        "enabled": True,
        "loss_scale": "dynamic",
        "enable_caching": True,
        "verbose": False,
        "allow_banned": False,
    },
    "scaler.LossScaler": {
        "loss_scale": NONE,
        "init_scale": 2.0**16,
        "scale_factor": 2.0,
        "scale_window": 2000,
        "min_loss_scale": None,
        "max_loss_scale": 2.0**24,
    },
}
EXTENSIONS = {"initialize": {"check_overflow": False}}
"""Arguments that apex does not have; they come last."""

MODULES = {
    "amp": ["init", "half_function", "register_float_function"],
    "frontend": ["Properties", "opt_levels", "O0", "O1", "O2", "O3", "initialize", "state_dict", "load_state_dict"],
    "handle": ["AmpHandle", "NoOpHandle", "scale_loss", "disable_casts"],
    "opt": ["OptimWrapper"],
    "scaler": ["LossScaler"],
    "utils": [],
    "wrap": [],
    "lists": [],
    "lists.functional_overrides": [],
    "lists.tensor_overrides": [],
    "lists.torch_overrides": [],
    "_amp_state": ["AmpState", "_amp_state", "warn_or_err", "maybe_print", "master_params"],
    "_initialize": [],
    "_process_optimizer": [],
    "compat": [],
    "rnn_compat": [],
}


@pytest.mark.parametrize("name", SIGNATURES)
def test_signatures(name):
    value = amp
    for part in name.split("."):
        value = getattr(value, part)
    found = {key: parameter.default for key, parameter in inspect.signature(value).parameters.items()}
    expected = SIGNATURES[name] | EXTENSIONS.get(name, {})
    assert list(found.items()) == list(expected.items())


@pytest.mark.parametrize("module", MODULES)
def test_modules_can_be_imported(module):
    found = importlib.import_module(f"apex_compat.amp.{module}")
    assert [name for name in MODULES[module] if not hasattr(found, name)] == []


def test_the_state_is_one_object():
    from apex_compat.amp._amp_state import _amp_state

    assert amp._amp_state is _amp_state
    assert {"state_dict", "load_state_dict"} <= set(amp.__dict__)  # a script asks so
    assert (_amp_state.hard_override, _amp_state.allow_incoming_model_not_fp32) == (False, False)
    from apex_compat.amp.frontend import opt_levels

    assert sorted(opt_levels) == ["O0", "O1", "O2", "O3"]


def set_up(level="O2", **kwargs):
    network = mlp()
    return initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, **kwargs)


def step(network, optimizer, factor=1.0):
    backward(small_loss(network) * factor, optimizer)
    optimizer.step()


def small_loss(network):
    """Return a loss whose gradients do not overflow in half at a scale of 2**16."""
    return network(torch.ones(2, 4)).float().mean() / 64


def test_a_scale_that_a_script_sets():
    network, optimizer = set_up()
    amp._amp_state.loss_scalers[0]._loss_scale = 2**12
    with amp.scale_loss(torch.tensor(1.0), optimizer) as scaled:
        assert scaled.item() == 2.0**12
    step(network, optimizer, INF)
    assert amp._amp_state.loss_scalers[0].loss_scale() == 2.0**11
    assert amp._amp_state.loss_scalers[0].dynamic is True
    assert amp.state_dict()["loss_scaler0"]["loss_scale"] == 2.0**11


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
def test_what_an_optimizer_carries(level):
    network, optimizer = set_up(level, loss_scale=128.0)
    assert hasattr(optimizer, "_amp_stash")
    for name in ("_prepare_amp_backward", "_post_amp_backward", "_amp_lazy_init"):
        assert callable(getattr(optimizer, name)), name
    stash = optimizer._amp_stash
    assert (stash.lazy_init_called, stash.already_patched, stash.params_have_scaled_gradients) == (False,) * 3
    backward(small_loss(network), optimizer, delay_unscale=True)
    assert stash.params_have_scaled_gradients
    backward(small_loss(network), optimizer)
    assert not stash.params_have_scaled_gradients
    assert stash.lazy_init_called
    optimizer.step()
    assert not stash.already_patched


def test_masters_that_a_script_makes_and_reads():
    network, optimizer = set_up()
    optimizer._lazy_init_maybe_master_weights()
    optimizer._amp_stash.lazy_init_called = True
    stash = optimizer._amp_stash
    assert list(map(id, stash.all_fp16_params)) == list(map(id, network.parameters()))
    assert list(map(id, stash.all_fp32_from_fp16_params)) == list(map(id, amp.master_params(optimizer)))
    assert [len(stash.fp16_groups), len(stash.fp32_from_fp16_groups), len(stash.fp32_from_fp32_groups)] == [1, 1, 1]
    assert stash.all_fp32_from_fp32_params == []
    step(network, optimizer)
    for param, master in zip(stash.all_fp16_params, stash.all_fp32_from_fp16_params, strict=True):
        assert torch.equal(param, master.half())
    with torch.no_grad():
        for master in stash.all_fp32_from_fp16_params:
            master.fill_(0.5)
    optimizer._master_params_to_model_params()
    assert all((param == 0.5).all() for param in network.parameters())


def test_a_frozen_weight_stays_and_may_be_unfrozen():
    network = mlp()
    network[0].requires_grad_(False)
    network, optimizer = initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level="O2")
    before = network[0].weight.detach().clone()
    step(network, optimizer)
    assert torch.equal(before, network[0].weight)
    before.copy_(before * 0.5)  # a moving average, or pretrained weights
    network[0].weight.data.copy_(before)
    optimizer.zero_grad()
    step(network, optimizer)
    assert torch.equal(before, network[0].weight)
    network[0].requires_grad_(True)
    amp._amp_state.loss_scalers[0]._loss_scale = 1024.0
    optimizer.zero_grad()
    step(network, optimizer)
    moved = (network[0].weight - before).abs().max().item()
    assert 0 < moved < 0.01  # a gradient that nobody unscaled would move it by far more


@pytest.mark.parametrize("level", ["O0", "O1", "O2", "O3"])
@pytest.mark.parametrize("after_a_step", [False, True])
def test_a_group_that_joins_is_trained(level, after_a_step):
    network = mlp()
    network, optimizer = initialize(network, OPTIMIZERS["sgd"](network[0].parameters()), opt_level=level)
    if after_a_step:
        step(network, optimizer)
        optimizer.zero_grad()
    optimizer.add_param_group({"params": list(network[2].parameters()), "lr": 0.5})
    before = [p.detach().clone() for p in network.parameters()]
    step(network, optimizer)
    assert all(not torch.equal(a, p) for a, p in zip(before, network.parameters(), strict=True))
    expected = torch.float16 if level == "O3" else torch.float32
    assert {p.dtype for p in amp.master_params(optimizer)} == {expected}
    assert optimizer.param_groups[1]["lr"] == 0.5


def test_o2_without_masters_steps_the_half_weights():
    network, optimizer = set_up(master_weights=False)
    step(network, optimizer)
    assert list(map(id, amp.master_params(optimizer))) == list(map(id, network.parameters()))
    assert {p.dtype for p in network.parameters()} == {torch.float16}


def test_the_handle_takes_the_casts_away():
    set_up("O1")
    handle = amp._amp_state.handle
    assert handle.is_active()
    x = torch.ones(2, 2)
    assert (x @ x).dtype == torch.float16
    handle._deactivate()
    assert changed() == []
    assert (x @ x).dtype == torch.float32
    handle._deactivate()


# --- amp.init


def legacy(num_loss=1, **kwargs):
    handle = amp.init(**kwargs)
    network = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    return handle, network, handle.wrap_optimizer(torch.optim.SGD(network.parameters(), lr=0.1), num_loss=num_loss)


def wrapped_backward(network, optimizer, factor=1.0):
    with optimizer.scale_loss(small_loss(network) * factor) as scaled:
        scaled.backward()


def test_the_legacy_handle_trains():
    torch.manual_seed(1)
    handle, network, optimizer = legacy()
    assert handle.is_active()
    assert network(torch.ones(2, 4)).dtype == torch.float16
    with handle._disable_casts():
        assert network(torch.ones(2, 4)).dtype == torch.float32
    twin = [p.detach().clone() for p in network.parameters()]
    wrapped_backward(network, optimizer)
    grads = [p.grad.clone() for p in network.parameters()]
    optimizer.step()
    for param, before, grad in zip(network.parameters(), twin, grads, strict=True):
        assert torch.equal(param, before - 0.1 * grad)
    assert optimizer.param_groups[0]["lr"] == 0.1  # attributes are those of the optimizer
    with pytest.raises(NotImplementedError):
        optimizer.step(lambda: None)
    with (
        pytest.raises(RuntimeError, match="old Amp API is no longer supported"),
        handle.scale_loss(torch.ones(()), optimizer),
    ):
        pass


def test_the_legacy_handle_skips_if_any_loss_overflows():
    handle, network, optimizer = legacy(num_loss=2)
    before = [p.detach().clone() for p in network.parameters()]
    wrapped_backward(network, optimizer, INF)
    wrapped_backward(network, optimizer)
    optimizer.step()
    assert all(map(torch.equal, before, network.parameters()))
    optimizer.zero_grad()
    for _ in range(2):
        wrapped_backward(network, optimizer)
    both = [p.grad.clone() for p in network.parameters()]
    optimizer.step()
    assert not torch.equal(before[0], next(network.parameters()))
    assert all(torch.isfinite(g).all() for g in both)
    assert handle.has_cache
    network(torch.ones(2, 4))
    assert [(p.dtype, cast.dtype) for p, cast in handle.cache.items()] == [(torch.float32, torch.float16)] * 4
    handle.remove_cache(network[0].weight)
    assert list(map(id, handle.cache)) == list(map(id, [network[0].bias, *network[2].parameters()]))
    handle._clear_cache()
    assert handle.cache == {}


def test_a_legacy_handle_may_be_disabled():
    handle = amp.init(enabled=False)
    assert not handle.is_active()
    assert changed() == []
    with handle._disable_casts():
        pass
    network = mlp()
    optimizer = handle.wrap_optimizer(OPTIMIZERS["sgd"](network.parameters()))
    with optimizer.scale_loss(network(torch.ones(2, 4)).sum()) as scaled:
        scaled.backward()
    optimizer.step()
