"""A histogram says what a loss scale flushes: just what rounding every element to fp16 says, at every scale."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from roundoff.gradients.exponents import KS, Exponents, predict
from roundoff.gradients.result import SHARES


def brute_force(values: torch.Tensor, k: int) -> list[float]:
    present = values[values != 0]
    rounded = (present * 2.0**k).half().abs().float()
    kinds = (rounded == 0, (rounded > 0) & (rounded < 2.0**-14), rounded.isinf())
    return [int(kind.sum()) / max(1, len(present)) for kind in kinds]


def check(values: torch.Tensor) -> None:
    exponents = Exponents()
    for part in values.split(max(1, len(values) // 3)):
        exponents.add(part)
    predicted = predict(exponents)
    for index, k in enumerate(KS):
        assert [predicted[share][index] for share in SHARES] == brute_force(values, k), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_scale_of_random_gradients(dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    exponent = torch.empty(100_000).uniform_(-60, 30, generator=generator)
    values = (torch.randn(100_000, generator=generator) * exponent.exp2()).to(dtype)
    values[::7] = 0
    check(values)


EDGES = [2.0**-25, 2.0**-24, 2.0**-14 - 2.0**-25, 2.0**-14, 65504.0, 65520.0, 65536.0, 2.0**-15, 2.0**15]
"""Halfway to fp16's smallest number, that number, its smallest normal one less half a step, halfway to inf, others."""


@pytest.mark.parametrize("edge", EDGES)
def test_every_edge_and_its_neighbours(edge) -> None:
    at = torch.tensor([edge]) * 2.0 ** torch.arange(-30, 31)
    check(torch.cat((at, -at, at.nextafter(torch.tensor(0.0)), at.nextafter(torch.tensor(torch.inf)))))


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), max_size=30))
def test_any_numbers_and_zeros_which_are_not_counted(numbers) -> None:
    check(torch.tensor([0.0, -0.0, *numbers]))
