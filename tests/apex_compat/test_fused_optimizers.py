"""apex_compat.optimizers: formulas in float64, torch's SGD to the bit, state, both layouts of checkpoints, errors."""

import copy
import io
import math
import re
import types
from collections import defaultdict
from functools import lru_cache

import pytest
import torch
from torch import nn

from apex_compat.optimizers import (
    FusedAdagrad,
    FusedAdam,
    FusedLAMB,
    FusedMixedPrecisionLamb,
    FusedNovoGrad,
    FusedSGD,
)

ALL = [FusedAdam, FusedLAMB, FusedSGD, FusedNovoGrad, FusedAdagrad]
HALVES = [torch.float16, torch.bfloat16]
SGD = {"lr": 0.1, "momentum": 0.9}


def make(cls, params, **options):
    """Return an optimizer. FusedSGD has no default learning rate."""
    return cls(params, **((SGD | options) if cls is FusedSGD else options))


def tensors(*shapes, dtype=torch.float32):
    """Return parameters of random values."""
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64).to(dtype)) for shape in shapes]


@lru_cache
def gradients(seed, count):
    """Return the gradients of a step, of different sizes: shape (count, 16)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn((count, 16), generator=generator) * 10 ** torch.rand((count, 1), generator=generator).sub(0.7)


def fill(params, seed, missing=()):
    """Give parameters gradients that depend on `seed` and their index, None to those whose index is in `missing`."""
    for i, (param, values) in enumerate(zip(params, gradients(seed, len(params)), strict=True)):
        grad = values[: param.numel()].reshape(param.shape).to(param.device, param.dtype, copy=True)
        param.grad = None if i in missing else grad


def bits(optimizer):
    """Return every tensor of the parameters and the state, by its place."""
    params = [param for group in optimizer.param_groups for param in group["params"]]
    found = {(i, ""): param.detach().clone() for i, param in enumerate(params)}
    for i, param in enumerate(params):
        found |= {(i, name): v.clone() for name, v in optimizer.state.get(param, {}).items() if v is not None}
    return found


def equal(a, b):
    """Return True if two results of `bits` are equal in every bit and dtype."""
    return a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]) for key in a)


# The formulas: p and g are float64 tensors, s the state by name, changed in place, o the options, t the step of the
# group, n the norm of all gradients. Each returns the new p.


def corrections(o, t):
    on = o["bias_correction"]
    return (1 - o["betas"][0] ** t, 1 - o["betas"][1] ** t) if on else (1.0, 1.0)


def adam_update(p, g, s, o, t):
    b1, b2 = o["betas"]
    c1, c2 = corrections(o, t)
    coupled = not o.get("adam_w_mode", True)
    g = g + o["weight_decay"] * p if coupled else g
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1 if o.get("grad_averaging", True) else 1.0) * g
    s["exp_avg_sq"] = b2 * s["exp_avg_sq"] + (1 - b2) * g * g
    return (s["exp_avg"] / c1) / ((s["exp_avg_sq"] / c2).sqrt() + o["eps"]) + (0 if coupled else o["weight_decay"]) * p


def adam(p, g, s, o, t, n):
    return p - o["lr"] * adam_update(p, g, s, o, t)


def lamb(p, g, s, o, t, n):
    u = adam_update(p, g / (n / o["max_grad_norm"]) if n > o["max_grad_norm"] else g, s, o, t)
    pn, un = p.norm(), u.norm()
    adapted = (o.get("use_nvlamb") or o["weight_decay"] != 0) and pn > 0 and un > 0
    return p - (o["lr"] * pn / un if adapted else o["lr"]) * u


def novograd(p, g, s, o, t, n):
    b1, b2 = o["betas"]
    c1, c2 = corrections(o, t)
    order = 2 if o["norm_type"] == 2 else math.inf
    new = torch.linalg.vector_norm(g, order)
    old = s["norm"] if "norm" in s else torch.zeros_like(new) if o["init_zero"] else new
    s["norm"] = (b2 * old**2 + (1 - b2) * new**2).sqrt() if order == 2 else b2 * old + (1 - b2) * new
    d = s["norm"] / math.sqrt(c2) + o["eps"]
    inside = o.get("reg_inside_moment")
    g = g / d + o["weight_decay"] * p if inside else g
    s["exp_avg"] = b1 * s["exp_avg"] + (1 - b1 if o["grad_averaging"] else 1.0) * g
    u = s["exp_avg"] / c1 if inside else s["exp_avg"] / c1 / d + o["weight_decay"] * p
    return p - o["lr"] * u


def adagrad(p, g, s, o, t, n):
    g = g if o.get("adagrad_w_mode") else g + o["weight_decay"] * p
    s["sum"] = s["sum"] + g * g
    u = g / (s["sum"].sqrt() + o["eps"]) + (o["weight_decay"] * p if o.get("adagrad_w_mode") else 0)
    return p - o["lr"] * u


def sgd(p, g, s, o, t, n):
    d = g if o.get("wd_after_momentum") else g + o["weight_decay"] * p
    if o["momentum"]:
        first = "momentum_buffer" not in s
        s["momentum_buffer"] = d if first else o["momentum"] * s["momentum_buffer"] + (1 - o["dampening"]) * d
        d = d + o["momentum"] * s["momentum_buffer"] if o["nesterov"] else s["momentum_buffer"]
    u = d + o["weight_decay"] * p if o.get("wd_after_momentum") else d
    return p - o["lr"] * u


FORMULAS = {FusedAdam: adam, FusedLAMB: lamb, FusedNovoGrad: novograd, FusedAdagrad: adagrad, FusedSGD: sgd}
CASES = [
    (FusedAdam, {}),
    (FusedAdam, {"weight_decay": 0.1, "betas": (0.8, 0.95), "eps": 1e-3}),
    (FusedAdam, {"weight_decay": 0.1, "adam_w_mode": False}),
    (FusedAdam, {"bias_correction": False}),
    (FusedLAMB, {}),
    (FusedLAMB, {"weight_decay": 0.1, "adam_w_mode": False, "max_grad_norm": 0.3}),
    (FusedLAMB, {"weight_decay": 0.0, "max_grad_norm": 1e9}),
    (FusedLAMB, {"weight_decay": 0.0, "use_nvlamb": True, "bias_correction": False}),
    (FusedLAMB, {"grad_averaging": False}),
    (FusedNovoGrad, {}),
    (FusedNovoGrad, {"weight_decay": 0.1, "init_zero": True, "bias_correction": False}),
    (FusedNovoGrad, {"weight_decay": 0.1, "reg_inside_moment": True, "grad_averaging": False}),
    (FusedNovoGrad, {"norm_type": 0, "betas": (0.95, 0.9)}),
    (FusedAdagrad, {}),
    (FusedAdagrad, {"weight_decay": 0.1}),
    (FusedAdagrad, {"weight_decay": 0.1, "adagrad_w_mode": True}),
    (FusedSGD, {"weight_decay": 0.1, "dampening": 0.5}),
    (FusedSGD, {"weight_decay": 0.1, "wd_after_momentum": True}),
    (FusedSGD, {"weight_decay": 0.1, "wd_after_momentum": True, "nesterov": True}),
    (FusedSGD, {"weight_decay": 0.1, "wd_after_momentum": True, "momentum": 0.0}),
]
IDS = [f"{cls.__name__}-{'-'.join(map(str, options)) or 'defaults'}" for cls, options in CASES]
ATTRIBUTES = {"adam_w_mode", "use_nvlamb", "reg_inside_moment", "adagrad_w_mode", "wd_after_momentum"}


def worst_ulps(rows):
    """Return the largest distance of a value from the wanted one in units of the last place of fp32.

    A unit is that of the largest number that was added up: a difference of close numbers has no digits of its own.

    Args:
        rows: value, wanted value, value before, and a tensor whose largest magnitude was added too, for each step.
    """
    got, right, before, added = (
        torch.stack([t.double().flatten() for t in column]) for column in zip(*rows, strict=True)
    )
    parts = [right.abs(), before.abs(), added.abs().amax(dim=1, keepdim=True).expand_as(right)]
    unit = torch.exp2(torch.stack(parts).amax(dim=0).clamp(min=2.0**-126).log2().floor() - 23)
    return float(((got - right).abs() / unit).max())


def wanted(cls, optimizer, own, steps):
    """Return for each parameter with a gradient what `step` should make of its state and, by the name '', of itself."""
    trained = [(g, p) for g in optimizer.param_groups for p in g["params"] if p.grad is not None]
    norm = torch.stack([p.grad.double().norm() for _, p in trained]).norm()
    results = {}
    for group, p in trained:
        state = {name: value.double() for name, value in optimizer.state.get(p, {}).items()}
        for name in ("exp_avg", "exp_avg_sq", "sum"):
            state.setdefault(name, torch.zeros_like(p, dtype=torch.float64))
        new = FORMULAS[cls](p.detach().double(), p.grad.double(), state, group | own, steps[id(group)], norm)
        results[p] = state | {"": new}
    return results


@pytest.mark.parametrize(("cls", "options"), CASES, ids=IDS)
def test_each_of_100_steps_is_the_formula_to_4_ulp(cls, options, device):
    """Two groups, then a third; one parameter is zero at first, one has no gradient for 20 steps."""
    torch.manual_seed(1)
    params = [nn.Parameter(p.detach().to(device)) for p in tensors(7, (3, 5), 4, ())]
    nn.init.zeros_(params[2])
    groups = [{"params": params[:2]}, {"params": params[2:3], "lr": 0.01, "weight_decay": 0.2}]
    optimizer = make(cls, groups, **options)
    own = {name: value for name, value in options.items() if name in ATTRIBUTES}
    rows, steps = defaultdict(list), {}
    for step in range(100):
        if step == 30:
            optimizer.add_param_group({"params": params[3:], "lr": 0.02})
        fill(params, step, missing=[1] if step < 20 else [])
        steps = {id(group): steps.get(id(group), 0) + 1 for group in optimizer.param_groups}
        expected, before = wanted(cls, optimizer, own, steps), bits(optimizer)
        grads = [None if p.grad is None else p.grad.clone() for p in params]
        optimizer.step()
        for key, value in bits(optimizer).items():
            p, grad = params[key[0]], grads[key[0]]
            if p in expected:
                old = before.get(key, torch.zeros_like(value))
                added = grad if key[1] else grad * (0.1 if cls is FusedSGD else 0.0)  # 0.1: the learning rate
                rows[key].append((value, expected[p][key[1]], old, added))
                assert torch.equal(p.grad, grad)  # apex's LAMB left its update there
            else:
                assert torch.equal(value, before[key])
    assert max(map(worst_ulps, rows.values())) <= 4


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("cls", ALL)
def test_half_parameters_are_computed_in_fp32_and_rounded_once(cls, dtype):
    torch.manual_seed(2)
    half = tensors(6, (2, 3), dtype=dtype)
    optimizer = make(cls, half, weight_decay=0.1)
    for step in range(4):
        wide = [nn.Parameter(p.detach().float()) for p in half]
        twin = make(cls, wide, weight_decay=0.1)
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        fill(half, step)
        for p, w in zip(half, wide, strict=True):
            w.grad = p.grad.float()
        optimizer.step()
        twin.step()
        for key, value in bits(optimizer).items():
            assert value.dtype == (torch.float32 if (cls is FusedAdam and key[1]) or key[1] == "norm" else dtype)
            assert torch.equal(value, bits(twin)[key].to(dtype=value.dtype)), (step, key)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("options", [
    {},
    {"momentum": 0.9},
    {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
    {"weight_decay": 0.1},
], ids=lambda options: "-".join(options) or "plain")  # fmt: skip
def test_sgd_is_torchs_in_every_bit(options, dtype, device):
    """Parameters that join first, in between and last; two groups; a scheduler; state loaded from the other one."""
    results = []
    for cls in (FusedSGD, torch.optim.SGD):
        torch.manual_seed(3)
        params = [nn.Parameter(p.detach().to(device)) for p in tensors(5, (2, 3), 4, 1, dtype=dtype)]
        optimizer = cls([{"params": params[:3], "lr": 0.2}, {"params": params[3:]}], lr=0.1, **options)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        for step in range(20):
            fill(params, step, missing={0: [1, 2], 1: [0, 2], 2: [2]}.get(step, []))
            optimizer.step()
            scheduler.step()
        other = (torch.optim.SGD if cls is FusedSGD else FusedSGD)(
            [{"params": params[:3]}, {"params": params[3:]}], lr=0.1, **options
        )
        other.load_state_dict(optimizer.state_dict())
        fill(params, 20)
        other.step()
        results.append(bits(other))
    assert equal(*results)


LAYOUTS = [
    (FusedAdam, {"adam_w_mode": False}, {"exp_avg", "exp_avg_sq"}, {"step": 3}),
    (FusedLAMB, {"adam_w_mode": False}, {"exp_avg", "exp_avg_sq"}, {"step": 3}),
    (FusedSGD, {"wd_after_momentum": True}, {"momentum_buffer"}, {}),
    (FusedNovoGrad, {"reg_inside_moment": True}, {"exp_avg"}, {"step": 3, "exp_avg_sq": [(2,), (1,)]}),
    (FusedAdagrad, {"adagrad_w_mode": True}, {"sum"}, {}),
]


@pytest.mark.parametrize(("cls", "options", "names", "group"), LAYOUTS)
def test_the_state_has_apexs_layout_and_a_copy_goes_on_as_the_original(cls, options, names, group):
    torch.manual_seed(4)
    params = [*tensors(3, dtype=torch.float16), *tensors(2), *tensors(4, dtype=torch.float16)]
    optimizer = make(cls, params, weight_decay=0.1, **options)
    for step in range(3):
        fill(params, step)
        optimizer.step()
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    state = torch.load(stored)
    assert {name for s in state["state"].values() for name in s} == names
    found = {key: value for key, value in state["param_groups"][0].items() if key in ("step", "exp_avg_sq")}
    if "exp_avg_sq" in found:
        assert all(norms.dtype == torch.float32 for norms in found["exp_avg_sq"])
        found["exp_avg_sq"] = [tuple(norms.shape) for norms in found["exp_avg_sq"]]
    assert found == group

    copies = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = make(cls, copies, lr=7.0, **options)
    loaded.load_state_dict(state)
    cloned, twin = copy.deepcopy((params, optimizer))
    assert equal(bits(loaded), bits(optimizer))
    for some, other in ((params, optimizer), (copies, loaded), (cloned, twin)):
        fill(some, 3)
        other.step()
    assert equal(bits(loaded), bits(optimizer))
    assert equal(bits(twin), bits(optimizer))


@pytest.mark.parametrize(("cls", "origin", "options"), [
    (FusedAdam, torch.optim.AdamW, {"weight_decay": 0.1}),
    (FusedAdagrad, torch.optim.Adagrad, {"weight_decay": 0.1}),
])  # fmt: skip
def test_a_checkpoint_of_torchs_goes_on_as_torch_does(cls, origin, options):
    """It counts steps for each parameter, and has other settings in its groups."""
    torch.manual_seed(5)
    params = tensors(6, (2, 3))
    optimizer = origin(params, lr=0.01, **options)
    for step in range(5):
        fill(params, step)
        optimizer.step()
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    loaded = cls(copies, **options)
    loaded.load_state_dict(optimizer.state_dict())
    for some, other in ((params, optimizer), (copies, loaded)):
        for step in range(5, 8):
            fill(some, step)
            other.step()
    torch.testing.assert_close(copies, params, rtol=1e-6, atol=1e-7)
    if cls is FusedAdam:
        assert loaded.param_groups[0]["step"] == 8
        assert all("step" not in s for s in loaded.state.values())


def test_a_checkpoint_keeps_fp32_moments_of_half_parameters():
    """torch casts state to the dtype of its parameter: 1.2e-12 becomes 0 in float16."""
    param = nn.Parameter(torch.ones(2, dtype=torch.float16))
    moments = {"exp_avg": torch.full((2,), 3e-9), "exp_avg_sq": torch.full((2,), 1.2e-12)}
    group = {"lr": 1e-3, "bias_correction": True, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0, "step": 9}
    optimizer = FusedAdam([param])
    optimizer.load_state_dict({"state": {0: moments}, "param_groups": [group | {"params": [0]}]})
    assert equal(optimizer.state[param], moments)
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert optimizer.param_groups[0]["step"] == 10
    assert moments["exp_avg"][0] == torch.tensor(3e-9)  # the file's own tensors are left alone


def test_novograd_reads_the_norms_of_fp32_masters_into_half_parameters():
    """A run under amp O2 had masters, all fp32, and a new one loads its state before it makes them."""
    torch.manual_seed(6)
    masters = tensors(3, 2)
    saver = FusedNovoGrad(masters)
    fill(masters, 0)
    saver.step()
    loaded = FusedNovoGrad([nn.Parameter(masters[0].detach().half()), nn.Parameter(masters[1].detach())])
    loaded.load_state_dict(saver.state_dict())
    norms = [loaded.state[p]["norm"] for p in loaded.param_groups[0]["params"]]
    assert norms == [saver.state[p]["norm"] for p in masters]
    broken = saver.state_dict()
    broken["param_groups"][0]["exp_avg_sq"] = [torch.zeros(1), torch.zeros(2)]
    with pytest.raises(ValueError, match=r"1 norms of half-precision parameters and 2 of others; the group has 2"):
        loaded.load_state_dict(broken)


@pytest.mark.parametrize("materialized", [True, False])
def test_sgd_takes_amps_scaled_half_gradients_and_writes_the_half_parameters(materialized):
    torch.manual_seed(7)
    halves, wide = tensors(4, 3, dtype=torch.float16), tensors(2)
    masters = [nn.Parameter(p.detach().float()) for p in halves]
    optimizer = FusedSGD([*masters, *wide], materialize_master_grads=materialized, **SGD)
    optimizer._amp_stash = types.SimpleNamespace(fp16_groups=[halves], fp32_from_fp16_groups=[masters])
    twins = [nn.Parameter(p.detach().clone()) for p in (*masters, *wide)]
    plain = torch.optim.SGD(twins, **SGD)
    for step in range(3):
        fill(twins, step)
        for twin in twins[:2]:
            twin.grad = twin.grad.half().float()
        plain.step()
        for target, twin in zip([*(masters if materialized else halves), *wide], twins, strict=True):
            target.grad = (twin.grad * (1.0 if materialized else 128.0)).to(target.dtype)
        if not materialized:
            optimizer.most_recent_scale, optimizer.scale_set_by_backward = 128.0, True
        optimizer.step()
        assert (optimizer.most_recent_scale, optimizer.scale_set_by_backward) == (1.0, False)
        assert all(map(torch.equal, [*masters, *wide], twins))
        assert all(map(torch.equal, halves, [p.half() for p in masters]))


@pytest.mark.parametrize("cls", ALL)
def test_closures_zero_grad_and_the_scaler_of_torch(cls):
    torch.manual_seed(8)
    params = tensors(3)
    optimizer, (twins, twin) = make(cls, params), copy.deepcopy((params, make(cls, params)))

    def closure():
        assert torch.is_grad_enabled()
        fill(params, 0)
        return 5.0

    assert optimizer.step(closure) == 5.0
    fill(twins, 0)
    assert twin.step() is None
    assert torch.equal(params[0], twins[0])
    optimizer.zero_grad()  # FusedSGD's default keeps the gradients, as zeros
    assert params[0].grad is None or (cls is FusedSGD and not params[0].grad.any())
    fill(params, 1)
    optimizer.zero_grad(set_to_none=cls is FusedSGD)
    assert (cls is FusedSGD and params[0].grad is None) or not params[0].grad.any()
    scaler, before = torch.amp.GradScaler("cpu", init_scale=4.0), bits(twin)
    for bad in (True, False):
        scaler.scale(torch.zeros(()))
        fill(twins, 2)
        twins[0].grad[1] = math.inf if bad else 1.0
        scaler.step(twin)
        scaler.update()
        assert equal(bits(twin), before) == bad


def sparse(cls):
    def step():
        params = tensors((3, 2), (3, 2))
        optimizer = make(cls, params)
        fill(params, 0)
        params[1].grad = params[1].grad.to_sparse()
        before = bits(optimizer)
        try:
            optimizer.step()
        finally:
            assert equal(bits(optimizer), before)
            assert optimizer.param_groups[0].get("step", 0) == 0

    return step


ERRORS = [
    *[(sparse(cls), RuntimeError, f"{cls.__name__} was given a sparse gradient: use torch.optim.") for cls in ALL],
    *[
        (lambda cls=cls: make(cls, tensors(1), amsgrad=True), RuntimeError, f"{cls.__name__} has no AMSGrad variant")
        for cls in (FusedAdam, FusedLAMB, FusedNovoGrad)
    ],
    (lambda: FusedAdam(tensors(1), master_weights=True), RuntimeError, "needs capturable=True"),
    (lambda: FusedAdam(tensors(1), capturable=True), NotImplementedError, "use torch.optim.AdamW"),
    *[
        (lambda name=name: FusedAdam(tensors(1)).step(**{name: 1}), RuntimeError, "leave out grads")
        for name in ("grads", "output_params", "scale", "grad_norms")
    ],
    (lambda: FusedAdam(tensors(1)).step(grad_scaler=1), RuntimeError, "call grad_scaler.step(optimizer)"),
    (lambda: FusedNovoGrad(tensors(1), norm_type=1), RuntimeError, "norm_type is 1; it must be 2, or 0"),
    (lambda: FusedSGD(tensors(1), lr=-1.0), ValueError, "lr is -1.0; it must be 0 or more"),
    (lambda: FusedSGD(tensors(1), lr=1.0, momentum=-1.0), ValueError, "momentum is -1.0"),
    (lambda: FusedSGD(tensors(1), lr=1.0, weight_decay=-1.0), ValueError, "weight_decay is -1.0"),
    (lambda: FusedSGD(tensors(1), lr=1.0, nesterov=True), ValueError, "nesterov needs a momentum above 0"),
    (lambda: FusedSGD(tensors(1), 1.0, 0.9, 0.1, nesterov=True), ValueError, "and no dampening, not 0.9 and 0.1"),
    (lambda: FusedSGD(tensors(1)), ValueError, "lr"),
    (lambda: FusedMixedPrecisionLamb(tensors(1)), NotImplementedError, "is not offered: use FusedLAMB"),
]


@pytest.mark.parametrize(("call", "kind", "line"), ERRORS, ids=[line for _, _, line in ERRORS])
def test_mistakes_are_one_line(call, kind, line):
    with pytest.raises(kind, match=re.escape(line)) as caught:
        call()
    assert "\n" not in str(caught.value)
