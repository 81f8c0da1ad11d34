"""What gradients of several batches say of noise and bias, with how far that can be trusted.

All of it follows from inner products between batches. They are kept as sketches (Charikar, Chen, Farach-Colton,
"Finding frequent items in data streams", 2002): a random sign for each element, and a sum of signed elements for each
bucket. The inner product of two sketches has that of the vectors as its mean, and a standard deviation of at most
sqrt(2 / buckets) times the product of their norms; a tensor that has no more elements than buckets is kept as it is.
Standard errors are the jackknife's (Efron and Stein, "The jackknife estimate of variance", 1981): each batch is left
out once.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

SKETCHES = 1 << 17
"""Numbers in all sketches of a tensor together, unless that is under 256 a batch: then 256 a batch."""

LEAST_BATCHES = 3
"""With one left out, two are needed for a deviation."""


class Estimate(NamedTuple):
    """A figure and its standard error, each None where it does not exist."""

    value: float | None
    error: float | None


class Sketch:
    """The random signs of a tensor of this shape, which is taken as a matrix.

    Args:
        shape: of the tensor.
        batches: how many sketches will be kept.
        generator: of the signs.
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
        """An empty sketch, float64."""
        return torch.zeros(self._fold, self.columns, dtype=torch.float64)

    def add(self, sketch: Tensor, values: Tensor, rows: slice | Tensor) -> None:
        """Add the sketch of a tensor that is 0 but for its `rows`, a slice or their numbers, which are `values`."""
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

    def slices(self, elements: int) -> list[slice]:
        """All rows of the tensor in slices of about `elements` elements, for `add`."""
        rows = len(self._signs) if self._signs is not None else self._fold
        step = self._fold * max(1, elements // self.size)
        return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def gram(sketches: Tensor) -> Tensor:
    """Inner products between `sketches`, of shape (batches, ...); float64, shape (batches, batches)."""
    wide = sketches.flatten(1).double()
    return wide @ wide.t()


@dataclass(frozen=True)
class Moments:
    """Of vectors v_1 to v_n, or of several such families at once: tensors of equal shape, float64.

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
        """From the inner products."""
        return cls(products.sum(), products.trace(), len(products))

    @classmethod
    def without_each(cls, products: Tensor) -> Self:
        """Of all vectors but one, for each one."""
        squares = products.diagonal()
        return cls(products.sum() - 2 * products.sum(1) + squares, products.trace() - squares, len(products) - 1)

    def variance(self) -> Tensor:
        """Sum over the elements of their sample variance."""
        return ((self.sum_of_squares - self.square_of_sum / self.n) / (self.n - 1)).clamp(min=0.0)

    def mean_square(self) -> Tensor:
        """|mean|**2 of these vectors."""
        return self.square_of_sum.clamp(min=0.0) / self.n**2

    def square_of_mean(self) -> Tensor:
        """Estimate of |mean|**2 of what they were drawn from, without what their scatter adds; it can be negative."""
        return (self.square_of_sum - self.sum_of_squares) / (self.n * (self.n - 1))


def jackknife(values: Tensor) -> float:
    """Standard error of a figure whose value without each one of the batches is `values`."""
    n = len(values)
    return math.sqrt((n - 1) / n * float((values - values.mean()).square().sum()))


def norm_of_mean(reference: Tensor) -> float:
    """|mean gradient| over the batches whose inner products are `reference`."""
    return math.sqrt(float(Moments.of(reference).mean_square()))


def noise(reference: Tensor) -> Estimate:
    """Standard deviation between the batches whose inner products are `reference`, of all elements together."""
    without = Moments.without_each(reference).variance().sqrt()
    return _finite(float(Moments.of(reference).variance().sqrt()), jackknife(without))


def error_to_noise(squares: Tensor, reference: Tensor) -> Estimate:
    """Root mean square error over noise.

    Args:
        squares: |error|**2 of each batch, float64, shape (batches,).
        reference: inner products of the reference's gradients.
    """
    n = len(squares)
    ratio = (squares.mean() / Moments.of(reference).variance()).sqrt()
    without = ((squares.sum() - squares) / (n - 1) / Moments.without_each(reference).variance()).sqrt()
    return _finite(float(ratio), jackknife(without))


def bias(errors: Tensor, reference: Tensor) -> Estimate:
    """|mean error| over |mean gradient|, without what errors that average out add to the first.

    Its error leads upwards to the root of the square plus the square's standard error: bias**2 + s is
    (bias + error)**2. The bias can be told from 0 where its square exceeds 2 s.

    Args:
        errors: inner products of the errors.
        reference: inner products of the reference's gradients.
    """
    square = float(Moments.of(errors).square_of_mean() / Moments.of(reference).mean_square())
    without = Moments.without_each(errors).square_of_mean() / Moments.without_each(reference).mean_square()
    found = math.sqrt(max(0.0, square)) if math.isfinite(square) else math.nan
    spread = jackknife(without)
    return _finite(found, math.sqrt(found**2 + spread) - found if math.isfinite(spread) else math.nan)


def _finite(value: float, error: float) -> Estimate:
    """Without what a division by 0 gave."""
    return Estimate(*(number if math.isfinite(number) else None for number in (value, error)))
