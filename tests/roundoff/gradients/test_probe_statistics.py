"""Bias by simulation, figures that do not exist, and the sketches that inner products are taken of."""

import math
import statistics as plain

import pytest
import torch

from roundoff.gradients.statistics import Sketch, bias, critical_batch, error_to_noise, gram, noise

ONES = torch.ones(4, 10, dtype=torch.float64)


def test_bias_is_that_of_the_mean_however_loud_the_errors() -> None:
    """400 families of 4 errors of mean 0.3 (or 0) in each element, with a deviation of 1.

    The squares of the estimates would have the mean 0.09 (or 0) if none were cut off at 0: a shift shows that.
    """
    for mean in (0.3, 0.0):
        squares, naive = [], []
        for seed in range(400):
            generator = torch.Generator().manual_seed(seed)
            errors = mean + torch.randn(4, 10, dtype=torch.float64, generator=generator)
            shifted = bias(gram(torch.cat((errors, torch.full((4, 1), 3.0)), 1)), gram(ONES))
            squares.append(shifted.value**2 - 9.0 / 10)
            assert bias(gram(errors), gram(ONES)).value == pytest.approx(math.sqrt(max(0.0, squares[-1])), abs=1e-6)
            naive.append(float(errors.mean(0).square().mean()))
        assert abs(plain.mean(squares) - mean**2) < 3 * plain.stdev(squares) / 20
        assert plain.mean(naive) > mean**2 + 0.2  # what errors that average out would add


def test_what_does_not_exist_is_none() -> None:
    same, zero = torch.ones(5, 3), torch.zeros(5, 3)
    assert noise(gram(same)) == (0.0, 0.0)
    assert error_to_noise(torch.ones(5, dtype=torch.float64), gram(same)) == (None, None)
    assert bias(gram(same), gram(zero)) == (None, None)
    assert bias(gram(zero), gram(same)) == (0.0, 0.0)


@pytest.mark.parametrize(("apart", "seen"), [(1e-7, 0.0), (1e-4, 5e-5)])
def test_rounding_alone_is_no_noise(apart: float, seen: float) -> None:
    """Sketches are kept in fp32, so equal gradients may differ in its last bits; the deviation of 4 is half of one."""
    gradients = torch.ones(4, 1)
    gradients[0] += apart
    assert noise(gram(gradients)).value == pytest.approx(seen, rel=1e-2)


def test_a_small_tensor_is_kept_as_it_is() -> None:
    values = torch.randn(4, 3, 5, dtype=torch.float64).flatten(1)
    sketch = Sketch(torch.Size((4, 3, 5)), 32, torch.Generator())
    out = sketch.zeros()
    for rows in sketch.slices(1):
        sketch.add(out, values[rows], rows)
    assert torch.equal(out, values)


@pytest.mark.parametrize("shape", [(3000, 7), (50_000,), (100, 9, 4), (5, 6000)])
def test_a_sketch_is_linear_and_keeps_inner_products(shape) -> None:
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
        few = torch.where(values > 1.0, values, 0.0)
        by_rows, by_places = sketch.zeros(), sketch.zeros()
        for part, places in ((few[order], order), *((few[rows], rows) for rows in sketch.slices(4000))):
            sketch.add(by_rows, part, places)
            at = part.flatten().nonzero().flatten()
            sketch.add_some(by_places, part.flatten()[at], at, places)
        assert torch.allclose(by_places, by_rows, rtol=1e-12, atol=1e-12)
        sketches.append(whole.flatten())
    assert torch.allclose(sketches[0] + 0.5 * sketches[1], sketches[2], atol=1e-10)
    assert len(sketches[0]) < first.numel() or shape == (100, 9, 4)
    buckets = len(sketches[0])
    exact, kept = gram(torch.stack((first, third))), gram(torch.stack((sketches[0], sketches[2])))
    bound = 4 * math.sqrt(2 / buckets) * float(exact.diagonal().max())
    assert float((exact - kept).abs().max()) < bound


@pytest.mark.parametrize("n", [8, 32])
def test_two_standard_errors_cover_the_truth(n) -> None:
    """Of noise and error to noise in 94% of 1,000 families of gradients, some less with few batches."""
    covered = {"noise": 0, "error_to_noise": 0}
    for seed in range(1000):
        generator = torch.Generator().manual_seed(seed)
        true = 1.0 + torch.randn(n, 20, dtype=torch.float64, generator=generator)
        errors = 0.1 * torch.randn(n, 20, dtype=torch.float64, generator=generator)
        found = {"noise": noise(gram(true)), "error_to_noise": error_to_noise(errors.square().sum(1), gram(true))}
        for name, exact in {"noise": math.sqrt(20), "error_to_noise": 0.1}.items():
            value, error = found[name]
            covered[name] += abs(value - exact) <= 2 * error
    assert all(900 + n / 2 <= count <= 970 for count in covered.values()), covered


@pytest.mark.parametrize("n", [8, 32])
def test_a_critical_batch_is_told_where_there_is_a_bias(n) -> None:
    """A bias of 0 is taken for one in at most 5% of 1,000 families; one of three times its error nearly always."""
    found: dict[float, list[float | None]] = {}
    for mean in (0.0, 0.3):
        found[mean] = []
        for seed in range(1000):
            generator = torch.Generator().manual_seed(seed)
            true = 1.0 + torch.randn(n, 20, dtype=torch.float64, generator=generator)
            errors = mean + 0.3 * torch.randn(n, 20, dtype=torch.float64, generator=generator)
            found[mean].append(critical_batch(bias(gram(errors), gram(true)), gram(true)))
    told = {mean: [batch for batch in batches if batch is not None] for mean, batches in found.items()}
    assert len(told[0.0]) <= 50
    assert len(told[0.3]) >= 990
    assert plain.median(told[0.3]) == pytest.approx(1 / 0.3**2, rel=0.1)  # noise 1 and bias 0.3 in each element
