"""apex_compat.normalization: the formulas in float64, gradients, and which dtype comes out of which."""

import itertools
from numbers import Integral

import numpy as np
import pytest
import torch
from torch import nn

from apex_compat.normalization import FusedLayerNorm, FusedRMSNorm, MixedFusedLayerNorm, MixedFusedRMSNorm
from apex_compat.normalization import fused_layer_norm as functions

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
SHAPES = [((3, 8), 8), ((2, 3, 4), (3, 4)), ((2, 5), [5]), ((2, 4), np.int64(4))]
LAYER, RMS = (FusedLayerNorm, MixedFusedLayerNorm), (FusedRMSNorm, MixedFusedRMSNorm)


def formula(kind, x, shape, eps, weight=None, bias=None):
    """The norm in float64 of whatever dtype `x` has."""
    x = x.detach().double()
    dims = tuple(range(-len(torch.Size([shape] if isinstance(shape, Integral) else shape)), 0))
    if kind in ("layer", *LAYER):
        x = x - x.mean(dims, keepdim=True)
    y = x / (x.pow(2).mean(dims, keepdim=True) + eps).sqrt()
    y = y if weight is None else y * weight.detach().double()
    return y if bias is None else y + bias.detach().double()


def drawn(module):
    """Give a module random parameters in place of ones and zeros."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
    return module


@pytest.mark.parametrize("cls", [*LAYER, *RMS])
@pytest.mark.parametrize(("size", "shape"), SHAPES)
def test_modules_compute_the_formula(cls, size, shape):
    torch.manual_seed(1)
    module, x = drawn(cls(shape, eps=0.1)), torch.randn(size) * 3 + 1
    assert tuple(module.normalized_shape) == tuple([shape] if isinstance(shape, Integral) else shape)
    assert set(module.state_dict()) == ({"weight", "bias"} if cls in LAYER else {"weight"})
    wanted = formula(cls, x, shape, 0.1, module.weight, getattr(module, "bias", None))
    torch.testing.assert_close(module(x).double(), wanted, rtol=1e-6, atol=1e-6)
    for parameter in module.double().parameters():
        parameter.grad = None
    assert torch.autograd.gradcheck(module, x.double().requires_grad_())
    assert all(torch.equal(p, torch.full_like(p, n == "weight")) for n, p in cls(shape).named_parameters())


FUNCTIONS = {
    "fused_layer_norm": lambda f, x, w, b, shape: f(x, shape),
    "fused_layer_norm_affine": lambda f, x, w, b, shape: f(x, w, b, shape),
    "mixed_dtype_fused_layer_norm_affine": lambda f, x, w, b, shape: f(x, w, b, shape),
    "fused_rms_norm": lambda f, x, w, b, shape: f(x, shape),
    "fused_rms_norm_affine": lambda f, x, w, b, shape: f(x, w, shape),
    "mixed_dtype_fused_rms_norm_affine": lambda f, x, w, b, shape: f(x, w, shape),
    "manual_rms_norm": lambda f, x, w, b, shape: f(x, shape, w, 1e-6),
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_have_an_eps_of_1e_6_and_any_mix_of_dtypes(name, device):
    """The result has the input's dtype, in the mixed ones and manual_rms_norm the weight's, within two roundings."""
    torch.manual_seed(2)
    x64, w64, b64 = torch.randn(4, 6) * 1e-3, torch.rand(6) + 0.5, torch.randn(6)
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        x, (w, b) = x64.to(device, dtype), (t.to(device, weight_dtype) for t in (w64, b64))
        got = FUNCTIONS[name](getattr(functions, name), x, w, b, 6)
        affine = "affine" in name or name.startswith("manual")
        bias = b if name.endswith("layer_norm_affine") else None
        wanted = formula("layer" if "layer" in name else "rms", x, 6, 1e-6, w if affine else None, bias)
        if name.startswith("manual"):
            wide = weight_dtype.itemsize >= 4
            assert got.dtype == (
                torch.promote_types(weight_dtype, torch.promote_types(dtype, torch.float32)) if wide else weight_dtype
            )
        else:
            assert got.dtype == (weight_dtype if name.startswith("mixed") else dtype)
        coarsest = max([dtype, weight_dtype, torch.float32], key=lambda kind: torch.finfo(kind).eps)
        tolerance = 2 * torch.finfo(coarsest).eps
        torch.testing.assert_close(got.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("cls", [*LAYER, *RMS])
def test_modules_take_any_mix_of_dtypes_forward_and_backward(cls):
    for dtype, weight_dtype in itertools.product(DTYPES, DTYPES):
        module, x = cls(6).to(weight_dtype), torch.randn(4, 6).to(dtype).requires_grad_()
        y = module(x)
        assert y.dtype == (weight_dtype if cls.__name__.startswith("Mixed") else dtype)
        y.sum().backward()
        assert x.grad.dtype == dtype
        assert {p.grad.dtype for p in module.parameters()} == {weight_dtype}


@pytest.mark.parametrize("cls", [*LAYER, *RMS])
def test_statistics_are_fp32_where_those_of_float16_overflow(cls):
    """The square of 300 is inf in float16. Autocast to a half dtype does not change the dtype that comes out."""
    x = torch.tensor([[300.0, -300.0, 300.0, -300.0]], dtype=torch.float16)
    assert torch.equal(cls(4).half()(x), x / 300)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(cls(4).half()(x), x / 300)


def test_a_half_weight_multiplies_the_rounded_quotient_and_an_fp32_one_the_fp32_quotient():
    torch.manual_seed(3)
    x, weight = torch.randn(64, 16).half(), torch.rand(16).half()
    quotient = x.float() / (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
    for w, wanted in ((weight, quotient.half() * weight), (weight.float(), (quotient * weight.float()).half())):
        agree = functions.fused_rms_norm_affine(x, w, 16) == wanted
        assert agree.float().mean() > 0.99  # a number between two of float16 may round either way
    torch.testing.assert_close(functions.manual_rms_norm(x, 16, None, 1e-6), quotient)


@pytest.mark.parametrize("cls", [FusedLayerNorm, FusedRMSNorm])
def test_without_parameters(cls):
    module, x = cls(5, elementwise_affine=False, memory_efficient=True), torch.randn(2, 5)
    assert not list(module.parameters())
    assert not module.state_dict()
    torch.testing.assert_close(module(x).double(), formula(cls, x, 5, 1e-5), rtol=1e-6, atol=1e-6)
    assert repr(module) == f"{cls.__name__}((5,), eps=1e-05, elementwise_affine=False)"


@pytest.mark.parametrize("cls", [MixedFusedLayerNorm, MixedFusedRMSNorm])
def test_mixed_modules_always_have_weights(cls):
    with pytest.raises(RuntimeError, match=f"{cls.__name__} always has weights: use FusedLayerNorm or"):
        cls(5, elementwise_affine=False)
    with pytest.warns(UserWarning, match="leave out elementwise_affine") as caught:
        module = cls(5, elementwise_affine=True)
    assert caught[0].filename == __file__
    assert isinstance(module.weight, nn.Parameter)
