"""step(closure), with LBFGS above all."""

import pytest
import torch
from torch import nn

from fp16_cases import HALVES, INF, NAN, loss_of, masters_of, mixed, mlp, problem, same, snapshot, wrap


def lbfgs(params, **kwargs):
    return torch.optim.LBFGS(params, **{"lr": 0.5, "max_iter": 6, "history_size": 4, **kwargs})


def closure_for(network, optimizer, i=0, factors=(), max_norm=None):
    """Return a closure over `problem(i)` whose call number n multiplies its loss by factors[n], if any."""
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(network, *problem(i))
        factor = factors[len(calls)] if len(calls) < len(factors) else 1.0
        calls.append(optimizer.loss_scale)
        optimizer.backward(loss * factor)
        if max_norm is not None:
            optimizer.clip_master_grads(max_norm)
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


@pytest.mark.parametrize("dtype", HALVES)
def test_lbfgs_trains_half_parameters(dtype):
    network = mlp(dtype)
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=True)
    first = loss_of(network, *problem()).item()
    for _ in range(5):
        optimizer.step(closure_for(network, optimizer))
    assert loss_of(network, *problem()).item() < 0.3 * first
    for param, master in zip(network.parameters(), masters_of(optimizer), strict=True):
        assert torch.equal(param, master.to(dtype))


def test_the_masters_reach_the_model_before_every_call():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = wrap(lbfgs([weight], lr=0.1, max_iter=3))
    seen = []

    def closure():
        seen.append((weight.item(), masters_of(optimizer)[0].detach().half().item()))
        assert not optimizer.first_closure_call_this_step
        optimizer.zero_grad()
        loss = (weight.float() ** 2).sum()
        optimizer.backward(loss)
        return loss

    assert optimizer.first_closure_call_this_step
    optimizer.step(closure)
    assert optimizer.first_closure_call_this_step
    assert len(seen) >= 2
    assert all(model == master for model, master in seen)
    assert len({model for model, _ in seen}) == len(seen)


def test_an_overflowing_call_is_repeated_with_a_smaller_scale():
    networks = [mixed(torch.bfloat16), mixed(torch.bfloat16)]
    optimizers = [wrap(lbfgs(network.parameters()), dynamic_loss_scale=True) for network in networks]
    control, disturbed = (
        closure_for(network, optimizer, factors=factors)
        for network, optimizer, factors in zip(networks, optimizers, [(), (INF, INF, 1.0, NAN)], strict=True)
    )
    optimizers[0].step(control)
    optimizers[1].step(disturbed)
    assert disturbed.calls[:5] == [2.0**16, 2.0**15, 2.0**14, 2.0**14, 2.0**13]
    assert len(disturbed.calls) == len(control.calls) + 3
    assert optimizers[1].loss_scale == 2.0**13
    assert same(snapshot(networks[0]), snapshot(networks[1]))


def test_a_closure_that_always_overflows_ends_in_a_clear_error():
    network = mixed()
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=True)
    before = snapshot(network)
    closure = closure_for(network, optimizer, factors=[NAN] * 1000)
    with pytest.raises(RuntimeError, match="still overflow at loss scale"):
        optimizer.step(closure)
    assert closure.calls == [2.0**k for k in range(16, -101, -1)]
    assert same(before, snapshot(network))
    optimizer.loss_scale = 128.0
    assert optimizer.step(closure_for(network, optimizer)) is not None


@pytest.mark.parametrize("overflows", [128, 129])
def test_a_scale_that_falls_slowly_does_not_repeat_a_closure_for_long(overflows):
    """The last repetition may still succeed."""
    network = mixed()
    args = {"scale_factor": 1.001}
    optimizer = wrap(lbfgs(network.parameters(), max_iter=1), dynamic_loss_scale=True, dynamic_loss_args=args)
    closure = closure_for(network, optimizer, factors=[NAN] * overflows)
    before = snapshot(network)
    if overflows == 128:
        assert optimizer.step(closure) == loss_of(mixed(), *problem())
    else:
        with pytest.raises(RuntimeError, match="still overflow at loss scale"):
            optimizer.step(closure)
    assert len(closure.calls) == 1 + 128
    assert same(before, snapshot(network)) == (overflows == 129)


FOR_EVER = {"static": {"static_loss_scale": 64.0}, "smallest": {"dynamic_loss_scale": True}}


@pytest.mark.parametrize("kind", FOR_EVER)
def test_at_a_scale_that_stays_the_first_call_skips_and_a_later_one_fails(kind, capsys):
    network = mixed()
    args = {"init_scale": 64.0, "min_loss_scale": 64.0}
    optimizer = wrap(lbfgs(network.parameters()), verbose=True, dynamic_loss_args=args, **FOR_EVER[kind])
    # A state saved within a closure resumes with a first call.
    optimizer.load_state_dict(optimizer.state_dict() | {"first_closure_call_this_step": False})
    assert not optimizer.first_closure_call_this_step
    before = snapshot(network)
    closure = closure_for(network, optimizer, factors=(INF,))
    assert optimizer.step(closure) is None
    assert closure.calls == [64.0]
    assert optimizer.overflow
    assert same(before, snapshot(network))
    assert capsys.readouterr().out == "Gradient overflow: step skipped, loss scale stays at 64\n"
    with pytest.raises(RuntimeError, match="loss scale 64"):
        optimizer.step(closure_for(network, optimizer, factors=(1.0, INF)))


@pytest.mark.parametrize("dynamic", [True, False])
def test_gradients_without_a_finite_norm_skip_at_the_first_call_and_fail_later(dynamic):
    """A smaller scale would not help, so nothing is repeated."""
    network = mlp(torch.bfloat16)
    optimizer = wrap(lbfgs(network.parameters()), dynamic_loss_scale=dynamic, dynamic_loss_args={"init_scale": 1.0})
    before = snapshot(network)
    closure = closure_for(network, optimizer, factors=[1e38], max_norm=1.0)
    assert optimizer.step(closure) is None
    assert (closure.calls, optimizer.loss_scale) == ([1.0], 1.0)
    assert same(before, snapshot(network))
    with pytest.raises(RuntimeError, match="no finite norm"):
        optimizer.step(closure_for(network, optimizer, factors=[1.0, 1e38], max_norm=1.0))


def test_a_closure_without_backward_is_refused():
    optimizer = wrap(lbfgs(mlp().parameters()))
    with pytest.raises(RuntimeError, match=r"step\(closure\) was called before backward"):
        optimizer.step(lambda: torch.tensor(1.0))
