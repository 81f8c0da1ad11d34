"""Noise, bias and their standard errors, against what one would write down by hand."""

import math
import statistics as plain

import pytest
import torch

from roundoff.gradients.statistics import Sketch, bias, error_to_noise, gram, noise, norm_of_mean
from roundoff.gradients.tally import Gradients, Shares, Stagnation, Tally


def vectors(n: int, size: int, mean: float, seed: int) -> torch.Tensor:
    return mean + torch.randn(n, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def leave_one_out(figure, *families):
    """The jackknife, with a loop."""
    n = len(families[0])
    keep = [[j for j in range(n) if j != i] for i in range(n)]
    values = [figure(*(family[rows] for family in families)) for rows in keep]
    return math.sqrt((n - 1) / n * sum((value - plain.mean(values)) ** 2 for value in values))


def plain_noise(reference):
    return float(reference.var(0).sum().sqrt())


def plain_bias_squared(errors, reference):
    n = len(errors)
    square = float((errors.sum(0).square().sum() - errors.square().sum()) / (n * (n - 1)))
    return square / float(reference.mean(0).square().sum())


def test_noise_is_the_deviation_between_batches():
    reference = vectors(7, 40, 0.5, 0)
    estimate = noise(gram(reference))
    assert estimate.value == pytest.approx(plain_noise(reference), rel=1e-12)
    assert estimate.error == pytest.approx(leave_one_out(plain_noise, reference), rel=1e-9)
    assert norm_of_mean(gram(reference)) == pytest.approx(float(reference.mean(0).norm()), rel=1e-12)


def test_error_to_noise():
    reference, errors = vectors(6, 30, 0.5, 0), vectors(6, 30, 0.1, 1)

    def ratio(errors, reference):
        return math.sqrt(float(errors.square().sum(1).mean())) / plain_noise(reference)

    estimate = error_to_noise(errors.square().sum(1), gram(reference))
    assert estimate.value == pytest.approx(ratio(errors, reference), rel=1e-12)
    assert estimate.error == pytest.approx(leave_one_out(ratio, errors, reference), rel=1e-9)


def test_bias_and_its_error():
    reference, errors = vectors(8, 30, 2.0, 0), vectors(8, 30, 1.0, 1)
    square = plain_bias_squared(errors, reference)
    estimate = bias(gram(errors), gram(reference))
    assert estimate.value == pytest.approx(math.sqrt(square), rel=1e-12)
    spread = leave_one_out(plain_bias_squared, errors, reference)
    assert estimate.error == pytest.approx(math.sqrt(square + spread) - math.sqrt(square), rel=1e-9)


def test_bias_is_that_of_the_mean_however_loud_the_errors():
    """400 families of errors of mean 0.3 in each element: their estimates have that mean, within its error."""
    found = []
    for seed in range(400):
        errors = 0.3 + vectors(4, 10, 0.0, seed)
        found.append(plain_bias_squared(errors, torch.ones(4, 10, dtype=torch.float64)))
        estimate = bias(gram(errors), gram(torch.ones(4, 10, dtype=torch.float64)))
        assert estimate.value == pytest.approx(math.sqrt(max(0.0, found[-1])), abs=1e-12)
    assert abs(plain.mean(found) - 0.09) < 3 * plain.stdev(found) / 20


def test_errors_that_average_out_are_no_bias():
    errors = vectors(200, 50, 0.0, 3)
    estimate = bias(gram(errors), gram(torch.ones(200, 50)))
    naive = float(errors.mean(0).norm()) / math.sqrt(50)
    assert estimate.value < 0.6 * naive


def test_what_does_not_exist_is_none():
    same, zero = torch.ones(5, 3), torch.zeros(5, 3)
    assert noise(gram(same)) == (0.0, 0.0)
    assert error_to_noise(torch.ones(5, dtype=torch.float64), gram(same)) == (None, None)
    assert bias(gram(same), gram(zero)) == (None, None)
    assert bias(gram(zero), gram(same)) == (0.0, 0.0)


def test_a_small_tensor_is_kept_as_it_is():
    values = torch.randn(4, 3, 5, dtype=torch.float64).flatten(1)
    sketch = Sketch(torch.Size((4, 3, 5)), 32, torch.Generator())
    out = sketch.zeros()
    for rows in sketch.slices(1):
        sketch.add(out, values[rows], rows)
    assert torch.equal(out, values)


@pytest.mark.parametrize("shape", [(3000, 7), (50_000,), (100, 9, 4), (5, 6000)])
def test_a_sketch_is_linear_and_keeps_inner_products(shape):
    generator = torch.Generator().manual_seed(1)
    sketch = Sketch(torch.Size(shape), 64, generator)
    first, second = (
        torch.randn(shape[0], math.prod(shape[1:]), dtype=torch.float64, generator=generator) for _ in "12"
    )
    first += 1.0  # which unsigned sums would pile up
    third = first + 0.5 * second
    sketches = []
    for values in (first, second, third):
        whole, by_rows = sketch.zeros(), sketch.zeros()
        for rows in sketch.slices(4000):
            sketch.add(whole, values[rows], rows)
        order = torch.randperm(len(values), generator=generator)
        sketch.add(by_rows, values[order], order)
        assert torch.allclose(whole, by_rows, rtol=1e-12, atol=1e-12)
        sketches.append(whole.flatten())
    assert torch.allclose(sketches[0] + 0.5 * sketches[1], sketches[2], atol=1e-10)
    assert len(sketches[0]) < first.numel() or shape == (100, 9, 4)
    buckets = len(sketches[0])
    exact, kept = gram(torch.stack((first, third))), gram(torch.stack((sketches[0], sketches[2])))
    bound = 4 * math.sqrt(2 / buckets) * float(exact.diagonal().max())
    assert float((exact - kept).abs().max()) < bound


def test_a_linear_model_by_hand():
    """The gradient of w @ x is x. Of three batches, x = (b, 2**-26), at a loss scale of 1 and of 4 in fp16."""
    tiny = 2.0**-26
    sketch = Sketch(torch.Size((2,)), 3, torch.Generator())
    gradients, plain_tally, scaled_tally = Gradients(sketch, 3), *(Tally(torch.float16, sketch, 3) for _ in "12")
    for batch in range(3):
        x = torch.tensor([batch + 1.0, tiny], dtype=torch.float64)
        gradients.add(batch, x, None)
        plain_tally.compare(batch, x.half(), 1.0, x, None)
        scaled_tally.compare(batch, (4 * x).half(), 4.0, x, None)
    reference = gradients.products()
    assert noise(reference).value == pytest.approx(1.0, rel=1e-6)  # the deviation of 1, 2, 3
    assert norm_of_mean(reference) == pytest.approx(2.0, rel=1e-6)
    assert plain_tally.shares() == {"flushed": 0.5, "subnormal": 0.0, "overflowed": 0.0}
    assert plain_tally.squares.tolist() == [tiny**2] * 3
    assert error_to_noise(plain_tally.squares, reference).value == pytest.approx(tiny, rel=1e-6)
    assert bias(plain_tally.errors(), reference).value == pytest.approx(tiny / 2, rel=1e-6)
    assert torch.equal(plain_tally.errors(), plain_tally.flushed_errors())  # all of it is flushing
    assert scaled_tally.shares() == {"flushed": 0.0, "subnormal": 0.5, "overflowed": 0.0}
    assert scaled_tally.squares.tolist() == [0.0] * 3
    assert float(scaled_tally.flushed_errors().abs().sum()) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_shares_at_their_bounds(dtype):
    tiny = torch.finfo(dtype).tiny
    found = torch.tensor([0.0, -0.0, tiny, -tiny, tiny / 2, -tiny / 2, tiny / 4, 1.0, torch.inf, torch.nan]).to(dtype)
    counted = Shares(dtype)
    counted.add(found)
    assert counted.shares() == {"flushed": 0.2, "subnormal": 0.3, "overflowed": 0.2}
    masked = Shares(dtype)
    masked.add(found, torch.tensor([True, False, True, True, True, False, False, False, True, False]))
    assert masked.shares() == {"flushed": 0.2, "subnormal": 0.2, "overflowed": 0.2}


def test_what_overflows_is_counted_and_left_out():
    sketch = Sketch(torch.Size((4,)), 3, torch.Generator())
    tally = Tally(torch.float16, sketch, 3)
    x = torch.tensor([1.0, 70_000.0, 0.0, 2.5], dtype=torch.float64)
    found = torch.tensor([1.0, torch.inf, torch.nan, 2.0], dtype=torch.float16)
    for batch in range(3):
        tally.compare(batch, found, 1.0, x, None)
    assert tally.shares() == {"flushed": 0.0, "subnormal": 0.0, "overflowed": 1 / 3}
    assert tally.squares.tolist() == [0.25] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_stagnation_is_half_a_unit_in_the_last_place(dtype):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(5000, generator=generator) * torch.empty(5000).uniform_(-30, 0, generator=generator).exp2()
    weight[:3] = torch.tensor([0.0, 1.0, 2.0**-15])
    gradient = torch.randn(5000, generator=generator) * torch.empty(5000).uniform_(-40, 0, generator=generator).exp2()
    gradient[5:8] = 0
    counted = Stagnation(dtype)
    counted.add(weight, gradient.double(), 0.5)
    rounded = weight.to(dtype)
    step_up = rounded.abs().nextafter(torch.tensor(torch.inf, dtype=dtype)).double() - rounded.abs().double()
    expected = ((gradient.double() * 0.5).abs() < step_up / 2) & (gradient != 0)
    assert (counted.stagnated, counted.updates) == (int(expected.sum()), 4997)
    assert 0 < counted.stagnated < counted.updates
