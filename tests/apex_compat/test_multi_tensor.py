"""multi_tensor_applier with the operations of amp_C, against plain formulas; inf and nan anywhere."""

import itertools
import math
import re

import pytest
import torch

from apex_compat import amp_C
from apex_compat.multi_tensor_apply import MultiTensorApply, multi_tensor_applier
from apex_compat.optimizers import FusedAdagrad, FusedAdam, FusedLAMB, FusedNovoGrad, FusedSGD

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
SHAPES = [(5,), (2, 3), (), (0,)]


def lists(count, dtype=torch.float32, seed=1, device="cpu"):
    """Return `count` lists of random tensors."""
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator).to(device, dtype) for s in SHAPES] for _ in range(count)]


def zero(device="cpu"):
    """Return the flag of no overflow."""
    return torch.zeros(1, dtype=torch.int, device=device)


@pytest.mark.parametrize(("source", "target"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_scale_and_axpby_compute_in_fp32_and_round_once(source, target, device):
    (x, y), (out,), flag = lists(2, source, device=device), lists(1, target, device=device), zero(device)
    multi_tensor_applier(amp_C.multi_tensor_scale, flag, [x, out], 1 / 3)
    assert all(torch.equal(o, (a.float() * (1 / 3)).to(target)) for a, o in zip(x, out, strict=True))
    multi_tensor_applier(amp_C.multi_tensor_axpby, flag, [x, y, out], 0.7, -1.5, -1)
    for a, b, o in zip(x, y, out, strict=True):
        assert o.dtype == target
        assert torch.equal(o, (a.float() * 0.7 + b.float() * -1.5).to(target))
    assert not flag.any()
    multi_tensor_applier(amp_C.multi_tensor_scale, flag, [y, y], 2.0)  # in place, as unscaling does
    assert all(torch.equal(b, 2 * c) for b, c in zip(y, lists(2, source, device=device)[1], strict=True))


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_bad_number_anywhere_sets_the_flag(bad, device):
    """Numbers whose sum or whose square is inf do not set it."""
    places = [(i, j) for i, shape in enumerate(SHAPES) for j in range(math.prod(shape))]
    for dtype, which, place in itertools.product(DTYPES, (0, 1), [None, *places]):
        (x, y, out) = lists(3, dtype, device=device)
        largest = torch.finfo(dtype).max
        x[0].fill_(largest)
        y[1].fill_(-largest)
        if place:
            (x, y)[which][place[0]].view(-1)[place[1]] = bad
        for check in (-1, 0, 1):
            flag = zero(device)
            multi_tensor_applier(amp_C.multi_tensor_axpby, flag, [x, y, out], 0.5, 0.5, check)
            assert flag.item() == (place is not None and check in (-1, which)), (dtype, which, place, check)
        flag = zero(device)
        multi_tensor_applier(amp_C.multi_tensor_scale, flag, [(x, y)[which], out], 0.5)
        assert flag.item() == (place is not None)
        if place:  # the bad number is carried on, and a flag that is set stays set
            assert not out[place[0]].view(-1)[place[1]].isfinite()
            multi_tensor_applier(amp_C.multi_tensor_scale, flag, lists(2), 1.0)
            assert flag.item() == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms(dtype, device):
    x, flag = lists(1, dtype, device=device)[0], zero(device)
    x[0] *= 1000  # float16's own sum of squares is inf
    each = torch.stack([t.double().norm() for t in x])
    for op in (amp_C.multi_tensor_l2norm, amp_C.multi_tensor_l2norm_mp):
        total, none = multi_tensor_applier(op, flag, [x], False)
        assert (total.shape, total.dtype, none.numel()) == ((1,), torch.float32, 0)
        total, norms = multi_tensor_applier(op, flag, [x], True)
        torch.testing.assert_close(norms.double(), each, rtol=1e-6, atol=0)
        torch.testing.assert_close(total.double(), each.norm()[None], rtol=1e-6, atol=0)
    out = [torch.empty_like(t) for t in x]
    total, norms = multi_tensor_applier(amp_C.multi_tensor_l2norm_scale, flag, [x, out], 0.25, True)
    torch.testing.assert_close(norms.double(), each / 4, rtol=1e-6, atol=0)
    assert all(torch.equal(o, (t.float() / 4).to(dtype)) for t, o in zip(x, out, strict=True))
    assert [t.tolist() for t in multi_tensor_applier(amp_C.multi_tensor_l2norm, flag, [[]], True)] == [[0.0], []]


def adam(g, p, s, n, t):
    return amp_C.multi_tensor_adam, [g, p, *s], (1e-3, 0.9, 0.999, 1e-8, t, 1, 1, 0.1)


def lamb(g, p, s, n, t):
    return amp_C.multi_tensor_lamb, [g, p, *s], (1e-3, 0.9, 0.999, 1e-6, t, 1, 0.1, 1, 1, n, 1.0, False)


def sgd(g, p, s, n, t):
    return amp_C.multi_tensor_sgd, [g, p, *s], (0.1, 0.9, 0.0, 0.1, False, t == 1, False, 1.0)


def adagrad(g, p, s, n, t):
    return amp_C.multi_tensor_adagrad, [g, p, *s], (1e-2, 1e-10, 0, 0.1)


def novograd(g, p, s, n, t):
    if t == 1:
        novograd.norms = torch.stack([grad.norm() for grad in g])
    return amp_C.multi_tensor_novograd, [g, p, *s], (novograd.norms, 1e-3, 0.9, 0.999, 1e-8, t, 1, 0.1, 1, 1, 2)


@pytest.mark.parametrize(("call", "cls", "states"), [
    (adam, FusedAdam, 2), (lamb, FusedLAMB, 2), (sgd, FusedSGD, 1), (adagrad, FusedAdagrad, 1),
    (novograd, FusedNovoGrad, 1),
])  # fmt: skip
def test_an_operation_is_the_step_of_its_optimizer_unless_the_flag_is_set(call, cls, states):
    params = [torch.nn.Parameter(p) for p in lists(1)[0]]
    optimizer = cls(params, weight_decay=0.1, **({"lr": 0.1, "momentum": 0.9} if cls is FusedSGD else {}))
    own = [p.detach().clone().requires_grad_() for p in params]  # a leaf, as a model's parameters are
    state = [[torch.zeros_like(p) for p in params] for _ in range(states)]
    for t in (1, 2, 3):
        (grads,) = lists(1, seed=t + 5)
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizer.step()
        norm, _ = multi_tensor_applier(amp_C.multi_tensor_l2norm, zero(), [grads], False)
        op, tensor_lists, args = call(grads, own, state, norm, t)
        before = [p.detach().clone() for p in own]
        multi_tensor_applier(op, zero() + 1, tensor_lists, *args)
        assert all(map(torch.equal, own, before))
        multi_tensor_applier(op, zero(), tensor_lists, *args)
        assert all(map(torch.equal, own, params))


def test_sgd_writes_the_half_copies_too():
    grads, params, momenta = lists(3)
    halves = [p.half() for p in params]
    multi_tensor_applier(
        amp_C.multi_tensor_sgd, zero(), [grads, params, momenta, halves], 0.0, 0.9, 0.0, 0.1, False, True, False, 0.5
    )
    assert all(torch.equal(h, p.half()) for h, p in zip(halves, params, strict=True))
    assert all(torch.equal(m, g * 0.5) for m, g in zip(momenta, grads, strict=True))


def test_what_apex_says_of_its_applier_and_what_amp_c_lacks():
    applier = MultiTensorApply(16)
    applier.check_avail()
    assert applier.available
    assert applier(lambda *args: args, 1, 2, 3, 4) == (16, 1, 2, 3, 4)
    line = "amp_C.multi_tensor_lamb_stage1_cuda is not offered; these are: multi_tensor_adagrad, multi_tensor_adam, "
    with pytest.raises(AttributeError, match=re.escape(line)):
        _ = amp_C.multi_tensor_lamb_stage1_cuda
