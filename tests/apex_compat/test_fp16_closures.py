"""step(closure), with LBFGS above all."""

import pytest
import torch
from torch import nn

from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot, wrap


def lbfgs(params, **kwargs):
    return torch.optim.LBFGS(params, lr=0.5, max_iter=6, history_size=4, **kwargs)


def closure_for(network, optimizer, i=0, factors=()):
    """Return a closure over `problem(i)` whose call number n multiplies its loss by factors[n], if any."""
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(network, *problem(i))
        factor = factors[len(calls)] if len(calls) < len(factors) else 1.0
        calls.append(optimizer.loss_scale if hasattr(optimizer, "loss_scale") else 1.0)
        optimizer.backward(loss * factor)
        return loss

    closure.calls = calls
    return closure


@pytest.mark.parametrize("line_search", [None, "strong_wolfe"])
@pytest.mark.parametrize("scale", [1.0, 2.0**12])
def test_lbfgs_in_fp32_is_plain_lbfgs(scale, line_search):
    plain, wrapped = mlp(), mlp()
    control = lbfgs(plain.parameters(), line_search_fn=line_search)
    optimizer = wrap(lbfgs(wrapped.parameters(), line_search_fn=line_search), static_loss_scale=scale)
    for i in range(3):

        def plain_closure(i=i):
            control.zero_grad()
            loss = loss_of(plain, *problem(i))
            loss.backward()
            return loss

        expected = control.step(plain_closure)
        assert optimizer.step(closure_for(wrapped, optimizer, i)) == expected
    assert same(snapshot(plain), snapshot(wrapped))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_lbfgs_trains_half_parameters(dtype):
    network = mlp(dtype)
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=True)
    first = loss_of(network, *problem()).item()
    for _ in range(5):
        optimizer.step(closure_for(network, optimizer))
    assert loss_of(network, *problem()).item() < 0.3 * first
    for param, master in zip(network.parameters(), optimizer.param_groups[0]["params"], strict=True):
        assert torch.equal(param, master.to(dtype))


def test_the_masters_reach_the_model_before_every_call_but_the_first():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = wrap(torch.optim.LBFGS([weight], lr=0.1, max_iter=3))
    seen = []

    def closure():
        master = optimizer.param_groups[0]["params"][0]
        seen.append((optimizer.first_closure_call_this_step, weight.item(), master.detach().half().item()))
        optimizer.zero_grad()
        loss = (weight.float() ** 2).sum()
        optimizer.backward(loss)
        return loss

    assert optimizer.first_closure_call_this_step
    optimizer.step(closure)
    assert len(seen) >= 2
    assert all(model == master for _, model, master in seen)
    assert len({model for _, model, _ in seen}) == len(seen)
    assert optimizer.first_closure_call_this_step


def test_an_overflowing_call_is_repeated_with_a_smaller_scale():
    control, disturbed = mixed(torch.bfloat16), mixed(torch.bfloat16)
    optimizers = [wrap(lbfgs(network.parameters()), dynamic_loss_scale=True) for network in (control, disturbed)]
    inf = float("inf")
    closures = [
        closure_for(control, optimizers[0]),
        closure_for(disturbed, optimizers[1], factors=(inf, inf, 1.0, float("nan"))),
    ]
    for optimizer, closure in zip(optimizers, closures, strict=True):
        optimizer.step(closure)
    assert closures[1].calls[:5] == [2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**13]
    assert len(closures[1].calls) == len(closures[0].calls) + 3
    assert optimizers[1].loss_scale == 2.0**13
    assert same(snapshot(control), snapshot(disturbed))


def test_a_closure_that_always_overflows_ends_in_a_clear_error():
    network = mixed()
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=True)
    before = snapshot(network)
    closure = closure_for(network, optimizer, factors=[float("nan")] * 1000)
    with pytest.raises(RuntimeError, match="still overflow at loss scale"):
        optimizer.step(closure)
    assert closure.calls == [2.0**k for k in range(16, -101, -1)]
    assert same(before, snapshot(network))
    optimizer.loss_scale = 128.0
    assert optimizer.step(closure_for(network, optimizer)) is not None


def test_a_static_scale_skips_at_the_first_call_and_fails_later(capsys):
    network = mixed()
    optimizer = wrap(lbfgs(network.parameters()), static_loss_scale=64.0, verbose=True)
    before = snapshot(network)
    assert optimizer.step(closure_for(network, optimizer, factors=(float("inf"),))) is None
    assert optimizer.overflow
    assert same(before, snapshot(network))
    assert "stays at 64" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="loss scale 64"):
        optimizer.step(closure_for(network, optimizer, factors=(1.0, float("inf"))))


@pytest.mark.parametrize("dynamic", [True, False])
def test_gradients_without_a_finite_norm_skip_at_the_first_call_and_fail_later(dynamic):
    """A smaller scale would not help, so nothing is repeated."""
    network = mlp(torch.bfloat16)
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=dynamic, dynamic_loss_args={"init_scale": 1.0})
    before = snapshot(network)

    def clipped(factors):
        inner = closure_for(network, optimizer, factors=factors)

        def closure():
            loss = inner()
            optimizer.clip_master_grads(1.0)
            return loss

        closure.calls = inner.calls
        return closure

    closure = clipped([1e38])
    assert optimizer.step(closure) is None
    assert (closure.calls, optimizer.loss_scale) == ([1.0], 1.0)
    assert same(before, snapshot(network))
    with pytest.raises(RuntimeError, match="no finite norm"):
        optimizer.step(clipped([1.0, 1e38]))


def test_other_optimizers_take_a_closure_too():
    plain, wrapped = mlp(), mlp()
    control = torch.optim.SGD(plain.parameters(), lr=0.1)
    optimizer = wrap(torch.optim.SGD(wrapped.parameters(), lr=0.1, fused=True), static_loss_scale=64.0)
    loss_of(plain, *problem()).backward()
    control.step()
    assert optimizer.step(closure_for(wrapped, optimizer)).item() == loss_of(mlp(), *problem()).item()
    assert same(snapshot(plain), snapshot(wrapped))


def test_a_closure_without_backward_is_refused():
    optimizer = wrap(lbfgs(mlp().parameters()))
    with pytest.raises(RuntimeError, match="backward"):
        optimizer.step(lambda: torch.tensor(1.0))


def test_a_state_saved_within_a_closure_resumes_with_a_first_call():
    network = mixed()
    optimizer = wrap(lbfgs(network.parameters()), static_loss_scale=64.0)
    optimizer.load_state_dict(optimizer.state_dict() | {"first_closure_call_this_step": False})
    assert not optimizer.first_closure_call_this_step
    # Only a first call is skipped under a static scale; at a later one this is an error.
    assert optimizer.step(closure_for(network, optimizer, factors=(float("inf"),))) is None
