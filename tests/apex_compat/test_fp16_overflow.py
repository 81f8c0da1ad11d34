"""An inf or nan anywhere skips the whole step and nothing else; where the original let some through."""

import pytest
import torch
from torch import nn

from fp16_cases import same, snapshot, wrap

BAD = [float("inf"), float("-inf"), float("nan")]
DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def parameters():
    torch.manual_seed(0)
    return [[nn.Parameter(torch.randn(3).to(dtype)) for dtype in DTYPES] for _ in range(2)]


def linear_loss(groups, coefficients):
    """Return a loss whose gradient for parameter j of group i is coefficients[i][j] in each element."""
    terms = [
        (p.float() * c).sum()
        for group, row in zip(groups, coefficients, strict=True)
        for p, c in zip(group, row, strict=True)
    ]
    return torch.stack(terms).sum()


def backwards(optimizer, groups, first, second, deferred):
    optimizer.zero_grad()
    optimizer.backward(linear_loss(groups, first), update_master_grads=not deferred)
    optimizer.backward(linear_loss(groups, second), update_master_grads=not deferred)
    if deferred:
        optimizer.update_master_grads()


CLEAN = [[0.5, -0.25, 2.0], [1.5, 0.125, -1.0]]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("deferred", [False, True], ids=["at once", "deferred"])
@pytest.mark.parametrize("later_backward", [False, True], ids=["first backward", "later backward"])
@pytest.mark.parametrize("group", [0, 1], ids=["first group", "later group"])
@pytest.mark.parametrize("which", range(3), ids=["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_gradient_anywhere_skips_the_step(bad, which, group, later_backward, deferred, dynamic):
    groups, twin_groups = parameters(), parameters()
    optimizer, twin = (
        wrap(
            torch.optim.SGD([{"params": list(g)} for g in params], lr=0.125, momentum=0.5),
            static_loss_scale=64.0,
            dynamic_loss_scale=dynamic,
            dynamic_loss_args={"init_scale": 64.0},
        )
        for params in (groups, twin_groups)
    )
    for each, params in ((optimizer, groups), (twin, twin_groups)):
        backwards(each, params, CLEAN, CLEAN, deferred)
        each.step()
    before = snapshot(groups, optimizer)
    assert same(before, snapshot(twin_groups, twin))

    dirty = [list(row) for row in CLEAN]
    dirty[group][which] = bad
    first, second = (CLEAN, dirty) if later_backward else (dirty, CLEAN)
    backwards(optimizer, groups, first, second, deferred)
    assert optimizer.overflow
    assert optimizer.found_inf.item() == 1.0
    assert optimizer.clip_master_grads(1.0).item() == -1.0
    assert optimizer.inspect_master_grad_data() is None
    assert optimizer.step() is None
    assert same(before, snapshot(groups, optimizer))
    # With updates at once the bad sum of the first backward is there at the second too, and counted again.
    overflows = 2 if not deferred and not later_backward else 1
    assert optimizer.loss_scale == (64.0 / 2**overflows if dynamic else 64.0)

    for each, params in ((optimizer, groups), (twin, twin_groups)):
        backwards(each, params, CLEAN, CLEAN, deferred)
        each.step()
    assert not optimizer.overflow
    assert same(snapshot(groups, optimizer), snapshot(twin_groups, twin))


@pytest.mark.parametrize("position", range(7))
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_bad_element_among_many_is_found(dtype, position):
    parameter = nn.Parameter(torch.zeros(7, dtype=dtype))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0))
    grad = torch.ones(7)
    grad[position] = float("nan")
    optimizer.backward((parameter.float() * grad).sum())
    assert optimizer.overflow


@pytest.mark.parametrize(("dtype", "value"), [(torch.float32, 1e30), (torch.bfloat16, 1e30)])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_finite_gradients_that_unscaling_turns_infinite_are_found(dtype, value, sign):
    scale = 2.0**-40
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), static_loss_scale=scale)
    parameter.grad = torch.full((2,), sign * value, dtype=dtype)
    assert torch.isfinite(parameter.grad).all()
    optimizer.update_master_grads()
    assert optimizer.overflow
    assert optimizer.step() is None
    assert torch.equal(parameter.float(), torch.ones(2))


def test_the_largest_float16_survives_the_smallest_scale():
    parameter = nn.Parameter(torch.ones(1, dtype=torch.float16))
    optimizer = wrap(torch.optim.SGD([parameter], lr=0.0), static_loss_scale=2.0**-100)
    parameter.grad = torch.full((1,), 65504.0, dtype=torch.float16)
    optimizer.update_master_grads()
    assert not optimizer.overflow
    assert optimizer.param_groups[0]["params"][0].grad.item() == 65504.0 * 2.0**100


@pytest.mark.parametrize("max_norm", [1.0, float("inf")])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_finite_gradients_without_a_finite_norm_are_not_clipped_to_zeros(dtype, fused, max_norm):
    parameter = nn.Parameter(torch.ones(2, dtype=dtype))
    optimizer = wrap(torch.optim.AdamW([parameter], lr=0.5, fused=fused), dynamic_loss_scale=True)
    optimizer.backward(parameter.float().sum())
    optimizer.step()
    before = snapshot([[parameter]], optimizer)
    optimizer.zero_grad()
    optimizer.loss_scale = 1.0
    optimizer.backward((parameter.float() * 3e38).mean())
    assert not optimizer.overflow
    assert optimizer.clip_master_grads(max_norm).item() == -1.0
    assert optimizer.overflow
    assert optimizer.param_groups[0]["params"][0].grad.tolist() == parameter.grad.tolist()
    optimizer.step()
    assert same(before, snapshot([[parameter]], optimizer))
    assert optimizer.loss_scale == 1.0


def test_check_overflow_false_applies_what_comes():
    parameter = nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), static_loss_scale=2.0, check_overflow=False)
    optimizer.backward((parameter.float() * torch.tensor([float("inf"), 1.0])).sum())
    assert not optimizer.overflow
    assert optimizer.found_inf.item() == 0.0
    optimizer.step()
    assert parameter.tolist() == [float("-inf"), 0.0]


def test_a_fused_step_reports_at_once_what_is_known_already(capsys):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0, fused=True), static_loss_scale=8.0, verbose=True)
    optimizer.backward(parameter.sum() * float("nan"))
    assert optimizer.overflow
    assert capsys.readouterr().out == ""
    assert optimizer.step() is None
    assert capsys.readouterr().out == "Gradient overflow: step skipped, loss scale stays at 8\n"
    assert parameter.item() == 0.0


@pytest.mark.parametrize("fused", [None, True])
def test_messages(capsys, fused):
    parameter = nn.Parameter(torch.zeros(1))
    inner = torch.optim.SGD([parameter], lr=1.0, fused=fused)
    optimizer = wrap(inner, dynamic_loss_scale=True, verbose=True)
    optimizer.backward(parameter.sum())
    optimizer.step()
    optimizer.zero_grad()
    optimizer.backward(parameter.sum() * float("nan"))
    optimizer.step()
    if fused:
        assert capsys.readouterr().out == ""
    assert optimizer.overflow
    assert optimizer.overflow
    expected = "Gradient overflow: step skipped, loss scale reduced from 65536 to 32768\n"
    assert capsys.readouterr().out == expected


def test_a_static_scale_says_that_it_stays(capsys):
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = wrap(torch.optim.SGD([parameter], lr=1.0), static_loss_scale=8.0, verbose=True)
    optimizer.backward(parameter.sum() * float("nan"))
    optimizer.step()
    assert capsys.readouterr().out == "Gradient overflow: step skipped, loss scale stays at 8\n"
