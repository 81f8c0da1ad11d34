"""The fp16 product that CPUs without fp16 instructions run, against torch's own and against exact arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from lm import kernels

ULP = 2.0**-10


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).to(dtype).requires_grad_() for size in ((5, 3, 24), (40, 24), (40,))]


@pytest.fixture(params=[False, True], ids=["fp32-product", "fp16-instructions"])
def has_instructions(request, monkeypatch) -> bool:
    monkeypatch.setattr(kernels, "cpu_multiplies_fp16", lambda: request.param)
    return bool(request.param)


@pytest.mark.usefixtures("has_instructions")
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_those_of_torch(autocast) -> None:
    dtype = torch.float32 if autocast else torch.float16
    ours, torchs = operands(dtype), operands(dtype)
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        y, expected = kernels.linear(*ours), F.linear(*torchs)
    assert y.dtype == expected.dtype == torch.float16
    torch.testing.assert_close(y, expected, rtol=2 * ULP, atol=2 * ULP)
    for out in (y, expected):
        (out.float() * torch.arange(40.0)).sum().backward()
    for a, b in zip(ours, torchs, strict=True):
        assert a.grad.dtype == b.grad.dtype == dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=2 * ULP, atol=1e-1)


def test_the_product_is_rounded_once(monkeypatch) -> None:
    """As a tensor core does it: exact products of fp16 operands, one rounding of their sum to fp16."""
    monkeypatch.setattr(kernels, "cpu_multiplies_fp16", lambda: False)
    x, weight, bias = operands(torch.float16)
    exact = F.linear(x.double(), weight.double(), bias.double())
    error = (kernels.linear(x, weight, bias).double() - exact).abs()
    half_ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) - 11)
    assert (error <= half_ulp * 1.001 + 1e-6).all()


def test_what_exceeds_fp16_is_inf_as_in_hardware(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies_fp16", lambda: False)
    big = torch.full((1, 4), 200.0).half()
    assert kernels.linear(big, torch.full((1, 4), 100.0).half(), torch.zeros(1).half()).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype) -> None:
    x, weight, bias = operands(dtype)
    assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))
