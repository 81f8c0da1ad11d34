"""Frozen parameters in the optimizer: nothing is written to them, and their masters follow what they are given."""

import copy

import pytest
import torch
from torch import nn

from fp16_cases import loss_of, mlp, problem, same, snapshot, train, wrap

HALVES = [torch.float16, torch.bfloat16]


def sgd(params):
    return torch.optim.SGD(params, lr=0.125, momentum=0.5)


def with_frozen_first(dtype, frozen=True):
    network = mlp(dtype)
    for parameter in network[0].parameters():
        parameter.requires_grad_(not frozen)
    return network, wrap(sgd(network.parameters()), static_loss_scale=64.0)


@pytest.mark.parametrize("dtype", HALVES)
def test_a_moving_average_survives_the_steps(dtype):
    """As of a target network: no gradient, but new weights after each step."""
    online, target = mlp(dtype), mlp(dtype, seed=5).requires_grad_(False)
    optimizer = wrap(sgd([*online.parameters(), *target.parameters()]), static_loss_scale=64.0)
    alone = mlp(dtype)
    alone_optimizer = wrap(sgd(alone.parameters()), static_loss_scale=64.0)
    wanted = [p.detach().clone() for p in target.parameters()]
    for _ in range(4):
        train(online, optimizer, steps=1)
        train(alone, alone_optimizer, steps=1)
        for average, p, q in zip(target.parameters(), online.parameters(), wanted, strict=True):
            average.data.mul_(0.75).add_(p.data, alpha=0.25)
            q.mul_(0.75).add_(p.data, alpha=0.25)
    assert same(snapshot(list(target.parameters())), snapshot(wanted))
    assert same(snapshot(online), snapshot(alone))
    saved = optimizer.state_dict()["fp32_from_fp16"][0]
    assert [torch.equal(m, w.float()) for m, w in zip(saved[4:], wanted, strict=True)] == [True] * 4


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_weights_loaded_while_frozen_are_where_training_goes_on(dtype, steps_before):
    network, optimizer = with_frozen_first(dtype)
    train(network, optimizer, steps=steps_before)
    pretrained = mlp(dtype, seed=7)[0].state_dict()
    network[0].load_state_dict(pretrained)
    twin = copy.deepcopy(network).requires_grad_(True)
    masters = optimizer.param_groups[0]["params"]
    twin_optimizer = wrap(sgd(twin.parameters()), static_loss_scale=64.0)
    with torch.no_grad():
        for mine, other in zip(masters[2:], twin_optimizer.param_groups[0]["params"][2:], strict=True):
            other.copy_(mine)
    if steps_before:
        for mine, other in zip(masters[2:], twin_optimizer.param_groups[0]["params"][2:], strict=True):
            twin_optimizer.state[other] = copy.deepcopy(optimizer.state[mine])
    network[0].requires_grad_(True)
    for net, opt in ((network, optimizer), (twin, twin_optimizer)):
        opt.zero_grad()
        opt.backward(loss_of(net, *problem()))
        opt.step()
    assert same(snapshot(network), snapshot(twin))
    assert same(snapshot(masters), snapshot(twin_optimizer.param_groups[0]["params"]))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_pause_costs_the_master_no_bit(dtype):
    network, optimizer = with_frozen_first(dtype, frozen=False)
    train(network, optimizer, steps=2)
    network[0].requires_grad_(False)
    masters = optimizer.param_groups[0]["params"][:2]
    before = snapshot(masters)
    assert not all(torch.equal(m, m.to(dtype).float()) for m in masters)
    train(network, optimizer, steps=2)
    optimizer.state_dict()
    assert same(before, snapshot(masters))
    network[0].requires_grad_(True)
    train(network, optimizer, steps=1)
    assert not same(before, snapshot(masters))


def test_unfrozen_within_a_step():
    network, optimizer = with_frozen_first(torch.float16)
    network[0].load_state_dict(mlp(torch.float16, seed=7)[0].state_dict())
    optimizer.zero_grad()
    optimizer.backward(loss_of(network, *problem()))
    network[0].requires_grad_(True)
    optimizer.step()
    assert same(snapshot(network[0]), snapshot(mlp(torch.float16, seed=7)[0]))
    assert torch.equal(optimizer.state_dict()["fp32_from_fp16"][0][0], network[0].weight.float())


@pytest.mark.parametrize("dtype", HALVES)
def test_a_state_without_masters_of_frozen_parameters_loads(dtype):
    """apex.fp16_utils made none."""
    network, optimizer = with_frozen_first(dtype)
    train(network, optimizer, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    state["fp32_from_fp16"] = [state["fp32_from_fp16"][0][2:]]
    other, restored = with_frozen_first(dtype)
    other.load_state_dict(mlp(dtype, seed=3).state_dict())
    other[0].load_state_dict(network[0].state_dict())
    restored.load_state_dict(state)
    assert same(snapshot(network, optimizer), snapshot(other, restored))

    everything, full = with_frozen_first(dtype, frozen=False)
    with pytest.raises(ValueError, match=r"\['fp32_from_fp16'\] has the shapes .* in group 0, not"):
        full.load_state_dict(state)
    assert same(snapshot(everything), snapshot(mlp(dtype)))


def test_a_state_with_all_masters_is_loaded_whole():
    network, optimizer = with_frozen_first(torch.float16)
    train(network, optimizer, steps=2)
    other, restored = with_frozen_first(torch.float16)
    other.load_state_dict(mlp(torch.float16, seed=3).state_dict())
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert same(snapshot(network, optimizer), snapshot(other, restored))


@pytest.mark.parametrize("dtype", HALVES)
def test_zero_grad_forgets_the_indices_of_sparse_gradients(dtype):
    """The loop of the README, one backward a step: each step moves the rows of its own batch and no others."""
    networks = [nn.Embedding(6, 3, sparse=sparse, dtype=dtype) for sparse in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    optimizers = [wrap(torch.optim.SGD(network.parameters(), lr=0.5), static_loss_scale=64.0) for network in networks]
    for tokens in ([1, 1, 4], [0, 2], [2, 5, 5]):
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            optimizer.backward(network(torch.tensor(tokens)).float().square().sum())
            optimizer.step()
        grad = optimizers[0].param_groups[0]["params"][0].grad
        assert grad.coalesce().indices().tolist() == [sorted(set(tokens))]
    assert same(*(snapshot(network, optimizer) for network, optimizer in zip(networks, optimizers, strict=True)))
