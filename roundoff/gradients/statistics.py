"""Estimate noise and bias from the gradients of several batches, each with its standard error.

All figures follow from inner products between batches. Gradients are kept as sketches (Charikar, Chen, Farach-Colton,
"Finding frequent items in data streams", 2002). A sketch has a random sign for each element, and a sum of signed
elements for each bucket. The inner product of two sketches has that of the vectors as its mean. Its standard deviation
is at most sqrt(2 / buckets) times the product of their norms. A tensor of no more elements than buckets is kept whole.
Standard errors are the jackknife's (Efron and Stein, "The jackknife estimate of variance", 1981), which leaves each
batch out once.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

SKETCHES = 1 << 17
"""Numbers in all sketches of a tensor together, but at least 256 a batch."""

ROUNDING = 1e-12
"""The share of |mean|**2 up to which a variance is rounding: sketches are kept in fp32."""

LEAST_BATCHES = 3
"""The fewest batches: with one left out, a deviation takes two."""


class Estimate(NamedTuple):
    """Holds a figure and its standard error, each None where it does not exist."""

    value: float | None
    error: float | None


class Sketch:
    """Sketches tensors of one shape, which are taken as matrices.

    Args:
        shape: of the tensors.
        batches: how many sketches will be kept.
        generator: draws the signs.
    """

    def __init__(self, shape: torch.Size, batches: int, generator: torch.Generator) -> None:
        self.columns = math.prod(shape[1:])
        rows = shape[0]
        buckets = max(256, SKETCHES // batches)
        self._fold = rows if shape.numel() <= buckets else max(1, buckets // self.columns)
        self._signs: Tensor | None = None
        if self._fold < rows:
            self._signs = (
                torch.randint(0, 2, (rows, self.columns), dtype=torch.int8, generator=generator).mul_(2).sub_(1)
            )
        self.size = self._fold * self.columns

    def zeros(self) -> Tensor:
        """Return an empty sketch, float64."""
        return torch.zeros(self._fold, self.columns, dtype=torch.float64)

    def add(self, sketch: Tensor, values: Tensor, rows: slice | Tensor) -> None:
        """Add to `sketch` that of a tensor whose `rows` (a slice, or their numbers) are `values`, and its others 0."""
        if self._signs is not None:
            values = values * self._signs[rows]
        if isinstance(rows, Tensor):
            sketch.index_add_(0, rows % self._fold, values)
            return
        if rows.start % self._fold:
            raise ValueError(f"rows start at {rows.start}, which is no multiple of {self._fold}")
        whole = len(values) // self._fold * self._fold
        sketch += values[:whole].view(-1, self._fold, self.columns).sum(0)
        sketch[: len(values) - whole] += values[whole:]

    def add_some(self, sketch: Tensor, values: Tensor, places: Tensor, rows: slice | Tensor) -> None:
        """Do what `add` does where most elements are 0: `values` are the others, at `places` of those rows, flat."""
        inside, columns = places // self.columns, places % self.columns
        whole = rows[inside] if isinstance(rows, Tensor) else inside + rows.start
        if self._signs is not None:
            values = values * self._signs[whole, columns]
        sketch.view(-1).index_add_(0, whole % self._fold * self.columns + columns, values)

    def slices(self, elements: int) -> list[slice]:
        """Return all rows of a tensor as slices of about `elements` elements, for `add`."""
        rows = len(self._signs) if self._signs is not None else self._fold
        step = self._fold * max(1, elements // self.size)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gram(sketches: Tensor) -> Tensor:
    """Return the inner products between `sketches`, shape (batches, ...), as float64, shape (batches, batches)."""
    wide = sketches.flatten(1).double()
    return wide @ wide.t()


@dataclass(frozen=True)
class Moments:
    """Holds sums over vectors v_1 to v_n, or over several such families at once: tensors of equal shape, float64.

    Attributes:
        square_of_sum: |v_1 + ... + v_n|**2.
        sum_of_squares: |v_1|**2 + ... + |v_n|**2.
        n: how many.
    """

    square_of_sum: Tensor
    sum_of_squares: Tensor
    n: int

    @classmethod
    def of(cls, products: Tensor) -> Self:
        """Return the moments of all vectors, given their inner products."""
        return cls(products.sum(), products.trace(), len(products))

    @classmethod
    def without_each(cls, products: Tensor) -> Self:
        """Return the moments of all vectors but one, for each one."""
        squares = products.diagonal()
        return cls(products.sum() - 2 * products.sum(1) + squares, products.trace() - squares, len(products) - 1)

    def variance(self) -> Tensor:
        """Return the sum of the elements' sample variances; 0 where rounding alone makes one."""
        found = ((self.sum_of_squares - self.square_of_sum / self.n) / (self.n - 1)).clamp(min=0.0)
        return torch.where(found < ROUNDING * self.mean_square(), 0.0, found)

    def mean_square(self) -> Tensor:
        """Return |mean|**2 of these vectors."""
        return self.square_of_sum.clamp(min=0.0) / self.n**2

    def square_of_mean(self) -> Tensor:
        """Estimate |mean|**2 of what they were drawn from, without what their scatter adds; it can be negative."""
        return (self.square_of_sum - self.sum_of_squares) / (self.n * (self.n - 1))


def jackknife(values: Tensor) -> float:
    """Return the standard error of a figure whose values without one batch, for each batch, are `values`."""
    n = len(values)
    return math.sqrt((n - 1) / n * float((values - values.mean()).square().sum()))


def norm_of_mean(reference: Tensor) -> float:
    """Return |mean gradient| over the batches whose inner products are `reference`."""
    return math.sqrt(float(Moments.of(reference).mean_square()))


def noise(reference: Tensor) -> Estimate:
    """Return the deviation of all elements together between the batches whose inner products are `reference`."""
    without = Moments.without_each(reference).variance().sqrt()
    return _finite(float(Moments.of(reference).variance().sqrt()), jackknife(without))


def error_to_noise(squares: Tensor, reference: Tensor) -> Estimate:
    """Return the root mean square error over the noise.

    Args:
        squares: |error|**2 of each batch, float64, shape (batches,).
        reference: inner products of the reference's gradients.
    """
    n = len(squares)
    ratio = (squares.mean() / Moments.of(reference).variance()).sqrt()
    without = ((squares.sum() - squares) / (n - 1) / Moments.without_each(reference).variance()).sqrt()
    return _finite(float(ratio), jackknife(without))


def bias(errors: Tensor, reference: Tensor) -> Estimate:
    """Return |mean error| over |mean gradient|, without what errors that average out add to the first.

    Its square has the standard error s. The error of the bias leads upwards: (bias + error)**2 is bias**2 + s. The bias
    can be told from 0 where its square exceeds 2 s.

    Args:
        errors: inner products of the errors.
        reference: inner products of the reference's gradients.
    """
    square = float(Moments.of(errors).square_of_mean() / Moments.of(reference).mean_square())
    without = Moments.without_each(errors).square_of_mean() / Moments.without_each(reference).mean_square()
    found = math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan
    spread = jackknife(without)
    return _finite(found, math.sqrt(found**2 + spread) - found if math.isfinite(spread) else math.nan)


def critical_batch(bias: Estimate, reference: Tensor) -> float | None:
    """Return (noise / |mean error|)**2: how many such batches in one have as much noise as the mode has bias.

    The noise of B batches together is sqrt(B) times smaller, and the bias stays. None where the bias cannot be told
    from 0: its square is within twice that square's standard error.
    """
    if bias.value is None or bias.error is None or (bias.value + bias.error) ** 2 >= 1.5 * bias.value**2:
        return None
    found = float(Moments.of(reference).variance() / Moments.of(reference).mean_square()) / bias.value**2
    return found if 0 < found < math.inf else None


def _finite(value: float, error: float) -> Estimate:
    """Return an estimate in which what a division by 0 gave is None."""
    return Estimate(*(number if math.isfinite(number) else None for number in (value, error)))
