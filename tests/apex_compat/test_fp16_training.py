"""Training through FP16_Optimizer against plain PyTorch, to the last bit at power-of-two scales."""

import pytest
import torch
from torch import nn

from fp16_cases import loss_of, mixed, mlp, problem, same, snapshot, train, wrap

SCALES = [1.0, 1024.0, 2.0**-8, 2.0**16]


def sgd(params, **kwargs):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, **kwargs)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("max_norm", [0.05, 1e9])
def test_fp32_training_is_plain_training(scale, max_norm):
    plain, wrapped = mlp(), mlp()
    control = sgd(plain.parameters())
    optimizer = wrap(sgd(wrapped.parameters()), static_loss_scale=scale)
    for i in range(10):
        x, y = problem(i)
        control.zero_grad()
        loss_of(plain, x, y).backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), max_norm)
        control.step()
        wrapped.zero_grad()
        optimizer.backward(loss_of(wrapped, x, y), update_master_grads=False)
        optimizer.update_master_grads()
        assert optimizer.clip_master_grads(max_norm) == norm
        optimizer.step()
        assert same(snapshot(plain, control), snapshot(wrapped, optimizer))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm_type", [2, 1.0, float("inf")])
def test_half_training_is_the_loop_by_hand(dtype, norm_type):
    by_hand, wrapped = mlp(dtype), mlp(dtype)
    masters = [p.detach().float().requires_grad_() for p in by_hand.parameters()]
    control = sgd(masters)
    optimizer = wrap(sgd(wrapped.parameters()), static_loss_scale=128.0)
    for i in range(10):
        x, y = problem(i)
        by_hand.zero_grad()
        (loss_of(by_hand, x, y) * 128.0).backward()
        for master, param in zip(masters, by_hand.parameters(), strict=True):
            master.grad = param.grad.float() * (1 / 128.0)
        norm = torch.nn.utils.clip_grad_norm_(masters, 0.05, norm_type)
        control.step()
        with torch.no_grad():
            for master, param in zip(masters, by_hand.parameters(), strict=True):
                param.copy_(master)
        wrapped.zero_grad()
        optimizer.backward(loss_of(wrapped, x, y), update_master_grads=False)
        optimizer.update_master_grads()
        assert optimizer.clip_master_grads(0.05, norm_type) == norm
        optimizer.step()
        assert same(snapshot(by_hand, control), snapshot(wrapped, optimizer))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("build", [mlp, lambda: mlp(torch.bfloat16), lambda: mixed(torch.bfloat16)])
@pytest.mark.parametrize("scale", SCALES[1:])
def test_a_scaled_twin_equals_the_control(build, deferred, scale):
    control, scaled = build(), build()
    first = wrap(sgd(control.parameters()))
    second = wrap(sgd(scaled.parameters()), static_loss_scale=scale)
    for network, optimizer in ((control, first), (scaled, second)):
        train(network, optimizer, max_norm=0.5, deferred=deferred)
    assert same(snapshot(control, first), snapshot(scaled, second))


@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("build", [lambda: mlp(torch.float16), lambda: mixed(torch.float16)])
def test_a_scaled_float16_twin_equals_the_control(build, deferred):
    # Scales that keep these gradients away from float16's subnormals, which are not exact.
    control, scaled = build(), build()
    first = wrap(sgd(control.parameters()), static_loss_scale=2.0**10)
    second = wrap(
        sgd(scaled.parameters()),
        dynamic_loss_scale=True,
        dynamic_loss_args={"init_scale": 2.0**11, "scale_window": 2, "max_loss_scale": 2.0**12},
    )
    for network, optimizer in ((control, first), (scaled, second)):
        train(network, optimizer, max_norm=0.5, deferred=deferred)
    assert second.loss_scale == 2.0**12
    assert same(snapshot(control, first), snapshot(scaled, second))


def test_dynamic_training_makes_progress():
    network = mlp(torch.float16)
    optimizer = wrap(torch.optim.Adam(network.parameters(), lr=0.02), dynamic_loss_scale=True)
    x, y = problem()
    first = loss_of(network, x, y).item()
    for _ in range(100):
        optimizer.zero_grad()
        optimizer.backward(loss_of(network, x, y))
        optimizer.step()
    assert loss_of(network, x, y).item() < 0.2 * first


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("deferred", [False, True])
@pytest.mark.parametrize("change", [None, 64.0, 100.0])
def test_backward_passes_add_up(dtype, deferred, change):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = wrap(torch.optim.SGD([weight], lr=1.0), static_loss_scale=1024.0)
    optimizer.backward(weight.float().sum() * 3, update_master_grads=not deferred)
    if change is not None:
        optimizer.loss_scale = change
    optimizer.backward(weight.float().sum() * 5, update_master_grads=not deferred)
    if deferred:
        optimizer.update_master_grads()
    master = optimizer.param_groups[0]["params"][0]
    # 100 is not a power of two: it leaves a rounding of the parameter's dtype.
    tolerance = 0.0 if change != 100.0 else 8 * torch.finfo(dtype).eps
    assert master.grad.item() == pytest.approx(8.0, abs=tolerance)
    optimizer.step()
    assert weight.item() == pytest.approx(-7.0, abs=tolerance)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_backward_passes_add_up_across_a_growth(dtype):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    args = {"init_scale": 16.0, "scale_window": 1}
    optimizer = wrap(torch.optim.SGD([weight], lr=1.0), dynamic_loss_scale=True, dynamic_loss_args=args)
    for coefficient in (1, 2, 3):
        optimizer.backward(weight.float().sum() * coefficient)
    assert optimizer.loss_scale == 128.0
    assert optimizer.param_groups[0]["params"][0].grad.item() == 6.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_updating_twice_changes_no_gradient(dtype):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = wrap(torch.optim.SGD([weight], lr=1.0), static_loss_scale=1024.0)
    optimizer.backward(weight.float().sum() * 3)
    optimizer.update_master_grads()
    assert optimizer.param_groups[0]["params"][0].grad.item() == 3.0


@pytest.mark.parametrize("zero", ["optimizer", "to none", "torch's name", "model", "model in place"])
def test_every_way_to_zero_gradients_starts_a_fresh_sum(zero):
    network = mixed()
    optimizer = wrap(sgd(network.parameters()), static_loss_scale=1024.0)
    x, y = problem()
    seen = []
    for _ in range(2):
        optimizer.backward(loss_of(network, x, y))
        seen.append(snapshot(optimizer.inspect_master_grad_data()))
        {
            "optimizer": optimizer.zero_grad,
            "to none": lambda: optimizer.zero_grad(set_grads_to_None=True),
            "torch's name": lambda: optimizer.zero_grad(set_to_none=True),
            "model": network.zero_grad,
            "model in place": lambda: network.zero_grad(set_to_none=False),
        }[zero]()
    assert same(seen[0], seen[1])


def test_a_backward_by_hand_after_zero_grad():
    networks = [mixed(), mixed()]
    optimizers = [wrap(sgd(network.parameters()), static_loss_scale=1024.0) for network in networks]
    for i in range(3):
        for network, optimizer in zip(networks, optimizers, strict=True):
            optimizer.zero_grad()
            loss = loss_of(network, *problem(i))
            if optimizer is optimizers[0]:
                optimizer.backward(loss)
            else:
                (loss * optimizer.loss_scale).backward()
                optimizer.update_master_grads()
            optimizer.step()
    assert same(snapshot(networks[0], optimizers[0]), snapshot(networks[1], optimizers[1]))


def test_zero_grad_zeroes_by_default_and_drops_on_request():
    network = mixed()
    optimizer = wrap(sgd(network.parameters()))
    masters = [p for group in optimizer.param_groups for p in group["params"]]
    optimizer.backward(loss_of(network, *problem()))
    optimizer.zero_grad()
    assert all(p.grad.count_nonzero() == 0 for p in [*masters, *network.parameters()])
    optimizer.zero_grad(set_grads_to_None=True)
    assert all(p.grad is None for p in [*masters, *network.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_parameter_without_gradient_is_left_alone(dtype):
    used, unused = (nn.Parameter(torch.ones(2, dtype=dtype)) for _ in range(2))
    optimizer = wrap(sgd([used, unused]), static_loss_scale=8.0)
    optimizer.backward(used.float().sum() + unused.float().sum())
    optimizer.step()
    after_first = unused.detach().clone()
    used.grad = unused.grad = None  # as the model's zero_grad does, which does not know the masters
    optimizer.backward(used.float().sum())
    # A gradient kept from the first step, or the momentum, would move it.
    assert optimizer.inspect_master_grad_data()[0][1] is None
    optimizer.step()
    assert torch.equal(unused, after_first)
    assert not torch.equal(used, after_first)


def test_a_tied_parameter_has_one_master():
    embedding = nn.Embedding(5, 3)
    decoder = nn.Linear(3, 5, bias=False)
    decoder.weight = embedding.weight
    network = nn.Sequential(embedding, decoder).half()
    optimizer = wrap(sgd(network.parameters()), static_loss_scale=64.0)
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(5, 3)]
    before = embedding.weight.detach().clone()
    optimizer.backward(network(torch.tensor([1, 2])).float().square().sum())
    optimizer.step()
    assert decoder.weight is embedding.weight
    assert not torch.equal(before, embedding.weight)
    assert torch.equal(embedding.weight, optimizer.param_groups[0]["params"][0].half())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_parameter_given_twice_is_unscaled_once(dtype):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    with pytest.warns(UserWarning, match="duplicate"):
        inner = torch.optim.SGD([weight, weight], lr=1.0)
    optimizer = wrap(inner, static_loss_scale=64.0)
    optimizer.backward(weight.float().sum() * 4)
    assert optimizer.clip_master_grads(2.0) == 4.0
    assert optimizer.inspect_master_grad_data()[0][1].item() == pytest.approx(2.0)


def test_a_parameter_can_be_frozen_and_unfrozen():
    network = mlp(torch.float16)
    network[0].weight.requires_grad_(False)
    optimizer = wrap(sgd(network.parameters()), static_loss_scale=64.0)
    frozen = network[0].weight.detach().clone()
    train(network, optimizer, steps=2)
    assert torch.equal(network[0].weight, frozen)
    network[0].weight.requires_grad_(True)
    train(network, optimizer, steps=2)
    assert not torch.equal(network[0].weight, frozen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_sparse_gradients_train_as_dense_ones(dtype, max_norm):
    networks = [nn.Embedding(6, 3, sparse=sparse) for sparse in (True, False)]
    networks[1].load_state_dict(networks[0].state_dict())
    tokens = torch.tensor([1, 1, 4, 4, 4, 0])
    coefficients = torch.arange(18.0).view(6, 3) / 16
    optimizers = []
    for network in networks:
        network.to(dtype)
        optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.5), static_loss_scale=64.0)
        for _ in range(2):
            network.zero_grad()
            optimizer.backward((network(tokens).float() * coefficients).sum(), update_master_grads=False)
            if dtype != torch.float16:  # torch itself cannot add sparse float16 gradients on the CPU
                loss = (network(tokens[:2]).float() * coefficients[:2]).sum()
                optimizer.backward(loss, update_master_grads=False)
            optimizer.update_master_grads()
            optimizer.clip_master_grads(max_norm)
            optimizer.step()
        optimizers.append(optimizer)
    # The order in which a norm adds differs, hence not to the last bit once it clips.
    sparse, dense = (p.weight.detach().float() for p in networks)
    assert torch.allclose(sparse, dense, rtol=1e-6 if max_norm > 1 else 1e-2, atol=0)
    assert optimizers[0].param_groups[0]["params"][0].grad.is_sparse


def test_repeated_sparse_indices_may_leave_float16():
    network = nn.Embedding(2, 1, sparse=True).half()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=1.0), static_loss_scale=1.0)
    optimizer.backward((network(torch.tensor([1, 1])) * 40000.0).float().sum())
    assert not optimizer.overflow
    assert optimizer.param_groups[0]["params"][0].grad.to_dense().tolist() == [[0.0], [80000.0]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_bad_sparse_gradient_is_found(dtype):
    network = nn.Embedding(4, 2, sparse=True).to(dtype)
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=1.0))
    before = network.weight.detach().clone()
    optimizer.backward((network(torch.tensor([1, 2])).float() * torch.tensor([[1.0], [float("nan")]])).sum())
    assert optimizer.step() is None
    assert optimizer.overflow
    assert torch.equal(before, network.weight)


def test_the_master_keeps_what_half_precision_rounds_away():
    weight = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = wrap(torch.optim.SGD([weight], lr=2.0**-14))
    for _ in range(16):
        optimizer.zero_grad()
        optimizer.backward(weight.float().sum())
        optimizer.step()
    assert optimizer.param_groups[0]["params"][0].item() == 1 - 2.0**-10
    assert weight.item() == 1 - 2.0**-10
