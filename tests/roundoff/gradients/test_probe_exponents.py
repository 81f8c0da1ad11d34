"""What a loss scale would flush, from a histogram: equal to rounding every element to fp16, at every scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundoff.gradients.exponents import KS, Exponents, predict


def brute_force(values: torch.Tensor, k: int) -> tuple[float, float, float]:
    present = values[values != 0]
    rounded = (present * 2.0**k).half().abs().float()
    kinds = (rounded == 0, (rounded > 0) & (rounded < 2.0**-14), rounded.isinf())
    return tuple(int(kind.sum()) / len(present) for kind in kinds)


def check(values: torch.Tensor) -> None:
    exponents = Exponents()
    for part in values.split(max(1, len(values) // 3)):
        exponents.add(part)
    for k in KS:
        assert exponents.shares(k) == brute_force(values, k), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale_of_random_gradients(dtype):
    generator = torch.Generator().manual_seed(0)
    exponent = torch.empty(100_000).uniform_(-60, 30, generator=generator)
    values = (torch.randn(100_000, generator=generator) * exponent.exp2()).to(dtype)
    values[::7] = 0
    check(values)


# Of fp16: halfway to the smallest number, that number, the smallest normal one less half a step, and halfway to inf.
EDGES = [2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 65504.0, 65520.0, 65536.0, 2.0**-15, 2.0**15]


@pytest.mark.parametrize("edge", EDGES)
def test_every_edge_and_its_neighbours(edge):
    at = torch.tensor([edge]) * 2.0 ** torch.arange(-30, 31)
    check(torch.cat((at, -at, at.nextafter(torch.tensor(0.0)), at.nextafter(torch.tensor(torch.inf)))))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=30))
def test_any_numbers(numbers):
    values = torch.tensor(numbers, dtype=torch.float32)
    if values.count_nonzero():
        check(values)


def test_zeros_are_not_counted():
    exponents = Exponents()
    exponents.add(torch.zeros(10))
    assert exponents.shares(0) == (0, 0, 0)
    exponents.add(torch.tensor([0.0, -0.0, 2.0**-25, 1.0, 65520.0]))
    assert predict(exponents)["flushed"][8] == 1 / 3
    assert predict(exponents)["overflowed"][8] == 1 / 3
