"""What happens to single gradients: inf and nan anywhere, sums over backward passes, sparse and frozen parameters."""

import copy
import itertools

import pytest
import torch
from torch import nn

from fp16_cases import DTYPES, HALVES, INF, NAN, loss_of, masters_of, mixed, mlp, problem, same, snapshot, train, wrap


def sgd(params, **kwargs):
    return torch.optim.SGD(params, lr=0.125, momentum=0.5, **kwargs)


def one(dtype, count=1, lr=1.0, **kwargs):
    """Return a parameter of ones and its optimizer."""
    parameter = nn.Parameter(torch.ones(count, dtype=dtype))
    return parameter, wrap(torch.optim.SGD([parameter], lr=lr), **kwargs)


def master_grad(optimizer):
    return masters_of(optimizer)[0].grad


def two_groups(dynamic):
    """Return a float16, a bfloat16 and a float32 parameter in each of two groups, and their optimizer."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3).to(dtype)) for dtype in DTYPES * 2]
    inner = sgd([{"params": params[:3]}, {"params": params[3:]}])
    args = {"init_scale": 64.0}
    return params, wrap(inner, static_loss_scale=64.0, dynamic_loss_scale=dynamic, dynamic_loss_args=args)


def two_backwards(params, optimizer, deferred, *coefficients):
    """Give parameter i the gradient that `coefficients` add up to at i, by one backward each."""
    optimizer.zero_grad()
    for row in coefficients:
        loss = torch.stack([(p.float() * c).sum() for p, c in zip(params, row, strict=True)]).sum()
        optimizer.backward(loss, update_master_grads=not deferred)
    if deferred:
        optimizer.update_master_grads()
    return optimizer.step()


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("bad", [INF, -INF, NAN])
def test_a_bad_gradient_anywhere_skips_the_step(bad, deferred, dynamic):
    clean = [0.5, -0.25, 2.0, 1.5, 0.125, -1.0]
    for which, later in itertools.product(range(6), (False, True)):
        disturbed, twin = two_groups(dynamic), two_groups(dynamic)
        two_backwards(*disturbed, deferred, clean, clean)
        two_backwards(*twin, deferred, clean, clean)
        before = snapshot(*disturbed)
        dirty = [bad if i == which else c for i, c in enumerate(clean)]
        assert two_backwards(*disturbed, deferred, *((clean, dirty) if later else (dirty, clean))) is None
        assert disturbed[1].overflow, (which, later)
        assert same(before, snapshot(*disturbed))
        # With updates at once the bad sum of the first backward is there at the second too, and counted again.
        overflows = 2 if not deferred and not later else 1
        assert disturbed[1].loss_scale == (64.0 / 2**overflows if dynamic else 64.0)
        two_backwards(*disturbed, deferred, clean, clean)
        two_backwards(*twin, deferred, clean, clean)
        assert not disturbed[1].overflow
        assert same(snapshot(*disturbed), snapshot(*twin))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sparse", [False, True])
def test_one_bad_element_among_many_is_found(dtype, sparse):
    for position in range(7):
        network = nn.Embedding(8, 1, sparse=sparse).to(dtype)
        optimizer = wrap(torch.optim.SGD(network.parameters(), lr=1.0))
        before = snapshot(network)
        grad = torch.ones(7, 1)
        grad[position] = NAN
        optimizer.backward((network(torch.arange(7)).float() * grad).sum())
        assert optimizer.step() is None
        assert optimizer.overflow
        assert same(before, snapshot(network))


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (torch.bfloat16, -1e30)])
def test_finite_gradients_that_unscaling_turns_infinite_are_found(dtype, value):
    parameter, optimizer = one(dtype, static_loss_scale=2.0**-40)
    parameter.grad = torch.full((1,), value, dtype=dtype)
    optimizer.update_master_grads()
    assert optimizer.overflow
    assert optimizer.step() is None
    assert parameter.item() == 1.0


def test_the_largest_float16_survives_the_smallest_scale():
    parameter, optimizer = one(torch.float16, static_loss_scale=2.0**-100)
    parameter.grad = torch.full((1,), 65504.0, dtype=torch.float16)
    optimizer.update_master_grads()
    assert not optimizer.overflow
    assert master_grad(optimizer).item() == 65504.0 * 2.0**100


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_gradients_without_a_finite_norm_are_not_clipped_to_zeros(dtype, fused):
    for max_norm in (1.0, INF):
        parameter = nn.Parameter(torch.ones(2, dtype=dtype))
        optimizer = wrap(torch.optim.AdamW([parameter], lr=0.5, fused=fused), dynamic_loss_scale=True)
        optimizer.backward(parameter.float().sum())
        optimizer.step()
        before = snapshot(parameter, optimizer)
        optimizer.zero_grad()
        optimizer.loss_scale = 1.0
        optimizer.backward((parameter.float() * 3e38).mean())
        assert not optimizer.overflow
        assert optimizer.clip_master_grads(max_norm).item() == -1.0
        assert optimizer.overflow
        assert master_grad(optimizer).tolist() == parameter.grad.tolist()
        optimizer.step()
        assert same(before, snapshot(parameter, optimizer))
        assert optimizer.loss_scale == 1.0


def test_without_the_check_everything_is_applied():
    parameter, optimizer = one(torch.float16, count=2, static_loss_scale=2.0, check_overflow=False)
    optimizer.backward((parameter.float() * torch.tensor([INF, 1.0])).sum())
    assert not optimizer.overflow
    assert optimizer.found_inf.item() == 0.0
    optimizer.step()
    assert parameter.tolist() == [-INF, 0.0]


def test_a_skipped_first_fused_step_cleans_its_momentum(monkeypatch):
    # Make sure that there is something to clean, whatever the allocator hands out.
    empty_like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t, **kw: empty_like(t, **kw).fill_(NAN))
    weight = nn.Parameter(torch.ones(3))
    optimizer = wrap(torch.optim.SGD([weight], lr=1.0, momentum=0.5, fused=True))
    for coefficient in (INF, 2.0):
        optimizer.zero_grad()
        optimizer.backward(weight.sum() * coefficient)
        optimizer.step()
    assert weight.tolist() == [-1.0] * 3
    assert optimizer.state[weight]["momentum_buffer"].tolist() == [2.0] * 3


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("asked", [False, True], ids=["step", "overflow, then step"])
def test_a_skip_is_printed_once(capsys, fused, dynamic, asked):
    change = "reduced from 65536 to 32768" if dynamic else "stays at 8"
    parameter = nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    optimizer = wrap(inner, static_loss_scale=8.0, dynamic_loss_scale=dynamic, verbose=True)
    optimizer.backward(parameter.sum())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(parameter.sum() * NAN)
    if asked:
        assert optimizer.overflow
    assert capsys.readouterr().out == ""
    optimizer.step()
    if fused and not asked:
        assert capsys.readouterr().out == ""  # the step does not know yet
    assert optimizer.overflow
    assert optimizer.overflow
    assert capsys.readouterr().out == f"Gradient overflow: step skipped, loss scale {change}\n"
    assert parameter.item() == -1.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("deferred", [False, True])
def test_backward_passes_add_up_where_the_scale_changes(dtype, deferred):
    growing = {"dynamic_loss_scale": True, "dynamic_loss_args": {"init_scale": 16.0, "scale_window": 1}}
    for scale in (1024.0, 64.0, 100.0, "grows"):
        weight, optimizer = one(dtype, **(growing if scale == "grows" else {"static_loss_scale": 1024.0}))
        for coefficient in (3, 4, 1):
            optimizer.backward(weight.float().sum() * coefficient, update_master_grads=not deferred)
            if scale != "grows":
                optimizer.loss_scale = scale
        if deferred:
            optimizer.update_master_grads()
        # 100 is not a power of two: it leaves a rounding of the parameter's dtype.
        tolerance = 0.0 if scale != 100.0 else 8 * torch.finfo(dtype).eps
        assert master_grad(optimizer).item() == pytest.approx(8.0, abs=tolerance)
        optimizer.step()
        assert weight.item() == pytest.approx(-7.0, abs=tolerance)


def test_zero_grad_zeroes_by_default_and_drops_on_request():
    network = mixed()
    optimizer = wrap(sgd(network.parameters()))
    params = [*masters_of(optimizer), *network.parameters()]
    optimizer.backward(loss_of(network, *problem()))
    optimizer.zero_grad()
    assert all(p.grad.count_nonzero() == 0 for p in params)
    for name in ("set_grads_to_None", "set_to_none"):
        optimizer.backward(loss_of(network, *problem()))
        optimizer.zero_grad(**{name: True})
        assert all(p.grad is None for p in params)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_parameter_given_twice_is_unscaled_once(dtype):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    with pytest.warns(UserWarning, match="duplicate"):
        inner = torch.optim.SGD([weight, weight], lr=1.0)
    optimizer = wrap(inner, static_loss_scale=64.0)
    optimizer.backward(weight.float().sum() * 4)
    assert optimizer.clip_master_grads(2.0) == 4.0
    assert optimizer.inspect_master_grad_data()[0][1].item() == pytest.approx(2.0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("max_norm", [0.5, 1e9])
def test_sparse_gradients_train_as_dense_ones(dtype, max_norm):
    weights = []
    for sparse in (True, False):
        torch.manual_seed(0)
        network = nn.Embedding(6, 3, sparse=sparse, dtype=dtype)
        optimizer = wrap(torch.optim.SGD(network.parameters(), lr=0.5), static_loss_scale=64.0)
        for tokens in ([1, 1, 4], [0, 2], [2, 5, 5]):
            optimizer.zero_grad()  # forgets the indices: each step moves the rows of its own batch and no others
            for part in (
                (tokens,) if dtype == torch.float16 else (tokens, tokens[:2])
            ):  # torch cannot add two in float16
                rows = network(torch.tensor(part)).float()
                optimizer.backward((rows * torch.arange(1.0, 4.0)).sum() / 16, update_master_grads=False)
            optimizer.update_master_grads()
            optimizer.clip_master_grads(max_norm)
            optimizer.step()
            grad = master_grad(optimizer)
            assert grad.is_sparse == sparse
            assert grad.to_dense().any(1).nonzero().flatten().tolist() == sorted(set(tokens))
            if sparse:
                assert grad.coalesce().indices().tolist() == [sorted(set(tokens))]
        weights.append(network.weight.detach().float())
    # The order in which a norm adds differs, hence not to the last bit once it clips.
    assert torch.allclose(*weights, rtol=0 if max_norm > 1 else 1e-2, atol=0)


def test_repeated_sparse_indices_may_leave_float16():
    network = nn.Embedding(2, 1, sparse=True).half()
    optimizer = wrap(torch.optim.SGD(network.parameters(), lr=1.0))
    optimizer.backward((network(torch.tensor([1, 1])) * 40000.0).float().sum())
    assert not optimizer.overflow
    assert master_grad(optimizer).to_dense().tolist() == [[0.0], [80000.0]]


def frozen_first(dtype=torch.float16, frozen=True):
    network = mlp(dtype)
    network[0].requires_grad_(not frozen)
    return network, wrap(sgd(network.parameters()), static_loss_scale=64.0)


def test_a_parameter_unfrozen_within_a_step_keeps_what_it_was_given():
    network, optimizer = frozen_first()
    given = mlp(torch.float16, seed=7)[0]
    network[0].load_state_dict(given.state_dict())
    optimizer.backward(loss_of(network, *problem()))
    network[0].requires_grad_(True)
    optimizer.step()
    assert same(snapshot(network[0]), snapshot(given))
    assert torch.equal(optimizer.state_dict()["fp32_from_fp16"][0][0], network[0].weight.float())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("masters", ["all", "trainable"])
def test_a_state_loads_with_and_without_masters_of_frozen_parameters(dtype, masters):
    network, optimizer = frozen_first(dtype)
    train(network, optimizer, steps=2)
    state = copy.deepcopy(optimizer.state_dict())
    other, restored = frozen_first(dtype)
    other.load_state_dict(mlp(dtype, seed=3).state_dict())
    if masters == "trainable":  # apex made no others
        state["fp32_from_fp16"] = [state["fp32_from_fp16"][0][2:]]
        other[0].load_state_dict(network[0].state_dict())
    restored.load_state_dict(state)
    assert same(snapshot(network, optimizer), snapshot(other, restored))
    if masters == "trainable":
        everything, full = frozen_first(dtype, frozen=False)
        with pytest.raises(ValueError, match=r"\['fp32_from_fp16'\] has the shapes .* in group 0, not"):
            full.load_state_dict(state)
        assert same(snapshot(everything), snapshot(mlp(dtype)))
