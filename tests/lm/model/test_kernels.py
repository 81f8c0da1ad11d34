"""The half product that CPUs without instructions for it run, against torch's own and against exact arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from lm.model import kernels

HALF = {torch.float16: 11, torch.bfloat16: 8}
"""dtype -> bits of its significand"""


def operands(dtype: torch.dtype) -> list[torch.Tensor]:
    torch.manual_seed(0)
    return [torch.randn(size).to(dtype).requires_grad_() for size in ((5, 3, 24), (40, 24), (40,))]


@pytest.fixture(params=[False, True], ids=["fp32-product", "half-instructions"])
def has_instructions(request, monkeypatch) -> bool:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: request.param)
    return bool(request.param)


@pytest.fixture(params=HALF, ids=str)
def half(request) -> torch.dtype:
    dtype: torch.dtype = request.param
    return dtype


@pytest.mark.usefixtures("has_instructions")
@pytest.mark.parametrize("autocast", [False, True])
def test_values_and_gradients_are_those_of_torch(half, autocast) -> None:
    dtype = torch.float32 if autocast else half
    ours, torchs = operands(dtype), operands(dtype)
    with torch.autocast("cpu", half, enabled=autocast):
        y, expected = kernels.linear(*ours), F.linear(*torchs)
    assert y.dtype == expected.dtype == half
    tolerance = 2.0 ** (2 - HALF[half])
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)
    for out in (y, expected):
        (out.float() * torch.arange(40.0)).sum().backward()
    for a, b in zip(ours, torchs, strict=True):
        assert a.grad.dtype == b.grad.dtype == dtype
        torch.testing.assert_close(a.grad, b.grad, rtol=tolerance, atol=100 * tolerance / 2)


def test_the_product_is_rounded_once(monkeypatch, half) -> None:
    """As a tensor core does it: exact products of half operands, one rounding of their sum to half."""
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: False)
    x, weight, bias = operands(half)
    exact = F.linear(x.double(), weight.double(), bias.double())
    error = (kernels.linear(x, weight, bias).double() - exact).abs()
    half_ulp = 2.0 ** (torch.floor(torch.log2(exact.abs())) - HALF[half])
    assert (error <= half_ulp * 1.001 + 1e-6).all()


def test_what_exceeds_fp16_is_inf_as_in_hardware(monkeypatch) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: False)
    big = torch.full((1, 4), 200.0).half()
    assert kernels.linear(big, torch.full((1, 4), 100.0).half(), torch.zeros(1).half()).isinf().all()


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_what_the_cpu_multiplies_is_left_to_torch(monkeypatch, dtype) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda half: half is dtype)
    x, weight, bias = operands(dtype)
    assert torch.equal(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


def test_fp32_stands_in_for_the_half_that_the_cpu_does_not_multiply(has_instructions, half) -> None:
    assert kernels.half_through_fp32(torch.ones(1, dtype=half)) is not has_instructions
    with torch.autocast("cpu", half):
        assert kernels.half_through_fp32(torch.ones(1)) is not has_instructions
    assert not kernels.half_through_fp32(torch.ones(1))
    assert not kernels.half_through_fp32(torch.ones(1, dtype=half, device="meta"))
