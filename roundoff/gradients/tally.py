"""Count one tensor's gradients in one mode, batch after batch."""

import itertools
import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from roundoff.errors import UsageError
from roundoff.gradients.magnitudes import Mask, count_kinds, where_flushed, where_not_zero
from roundoff.gradients.result import SHARES
from roundoff.gradients.statistics import Sketch, gram

CACHED_ELEMENTS = 1 << 18
"""How many elements are looked at together: 2 MB in float64, which stay in a CPU's cache."""


NEGLIGIBLE = 2.0**-40
"""The share of a tensor's largest element below which an element is taken for 0.

A key's bias in attention has no gradient, since softmax does not see it. Float64's rounding leaves some 2**-50 there.
"""


class Shares:
    """Counts the elements that a mode flushed, made subnormal and let overflow, of those that the reference has.

    Args:
        dtype: of the mode's products; its range decides what is subnormal.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.present = 0
        self.counts = dict.fromkeys(SHARES, 0)

    def add(self, gradient: Tensor, present: Tensor | None = None) -> None:
        """Count a gradient that is still scaled; `present` says where the reference's is not 0 (None: everywhere)."""
        masks = itertools.repeat(None) if present is None else (mask.numpy() for mask in pieces(present))
        for part, mask in zip(pieces(gradient), masks, strict=False):
            self._count(part, mask)

    def _count(self, part: Tensor, mask: Mask | None) -> int:
        """Count `part`, and return how many of its elements are flushed."""
        counts = count_kinds(part, torch.finfo(self.dtype).tiny, mask)
        for name, count in zip(SHARES, counts, strict=True):
            self.counts[name] += count
        self.present += part.numel() if mask is None else int(np.count_nonzero(mask))
        return counts[0]

    def shares(self) -> dict[str, float]:
        """Return the shares of all that was counted, from 0 to 1."""
        return {name: count / max(1, self.present) for name, count in self.counts.items()}


class Tally(Shares):
    """Counts the shares of a parameter's gradient, and keeps its errors.

    Args:
        dtype: as for `Shares`.
        sketch: for tensors of this shape.
        batches: how many there will be.

    Attributes:
        squares: |error|**2 of each batch.
    """

    def __init__(self, dtype: torch.dtype, sketch: Sketch, batches: int) -> None:
        super().__init__(dtype)
        self.squares = torch.zeros(batches, dtype=torch.float64)
        self._sketch = sketch
        self._errors = torch.zeros(batches, sketch.size)
        self._flushed = torch.zeros(batches, sketch.size)

    def compare(self, batch: int, gradient: Tensor, scale: float, reference: Tensor, rows: Tensor | None) -> None:
        """Count the gradient of batch `batch`, still multiplied by `scale`; both gradients have `rows` (None: all)."""
        errors, lost = self._sketch.zeros(), self._sketch.zeros()
        squares = 0.0
        for part, where in parts(self._sketch, rows):
            expected, scaled = as_matrix(reference)[part], as_matrix(gradient)[part]
            present = where_not_zero(expected)
            error = scaled.to(torch.float64, copy=True).div_(scale).sub_(expected)
            square = _square(error)
            if not math.isfinite(square):
                square = _square(error.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))
            squares += square
            self._sketch.add(errors, error, where)
            if self._count(scaled, present):
                places = where_flushed(scaled, present)
                self._sketch.add_some(lost, -expected.flatten()[places], places, where)
        self.squares[batch] = squares
        self._errors[batch], self._flushed[batch] = errors.flatten(), lost.flatten()

    def errors(self) -> Tensor:
        """Return the inner products of the errors of all batches."""
        return gram(self._errors)

    def flushed_errors(self) -> Tensor:
        """Return the inner products of the errors that there are if only the flushed elements are wrong."""
        return gram(self._flushed)


class Gradients:
    """Keeps the reference's gradients of one parameter in all batches.

    Args:
        sketch: for tensors of this shape.
        batches: how many there will be.
    """

    def __init__(self, sketch: Sketch, batches: int) -> None:
        self._sketch = sketch
        self._sketches = torch.zeros(batches, sketch.size)

    def add(self, batch: int, gradient: Tensor, rows: Tensor | None) -> None:
        """Keep the gradient of batch `batch`, which has `rows` (None: all)."""
        sketch = self._sketch.zeros()
        for part, where in parts(self._sketch, rows):
            self._sketch.add(sketch, as_matrix(gradient)[part], where)
        self._sketches[batch] = sketch.flatten()

    def products(self) -> Tensor:
        """Return the inner products between batches."""
        return gram(self._sketches)


class Differences:
    """Counts how far an output of the forward pass is from the reference's."""

    def __init__(self) -> None:
        self._count, self._sum, self._largest = 0, 0.0, 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        """Count a batch's output; both are vectors.

        Raises:
            UsageError: they are not of one length.
        """
        if found.shape != expected.shape:
            raise UsageError(f"an output has {found.numel()} numbers in a mode and {expected.numel()} in the reference")
        difference = found.double() - expected.double()
        self._count += difference.numel()
        self._sum += float(difference.sum())
        self._largest = max(self._largest, float(difference.abs().nan_to_num(nan=torch.inf).max()))

    def figures(self) -> dict[str, float | None]:
        """Return the mean difference and the largest one; None where an output was not finite."""
        finite = self._largest < torch.inf
        return {
            "mean": self._sum / max(1, self._count) if finite else None,
            "largest": self._largest if finite else None,
        }


class Stagnation:
    """Counts the updates that are smaller than half a unit in the last place of their weight, rounded to `dtype`."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.updates = self.stagnated = 0

    def add(self, weight: Tensor, update: Tensor) -> None:
        """Count the updates of `weight` that are not 0; both are fp32, vectors of equal length, `update` from 0 on."""
        finfo = torch.finfo(self.dtype)
        rounded = weight.to(self.dtype).float()
        binade = (rounded.view(torch.int32) & 0x7F800000).view(torch.float32)  # 2**floor(log2(|w|))
        half_unit = (binade.mul_(finfo.eps / 2)).clamp_(min=finfo.tiny * finfo.eps / 2)
        moved = where_not_zero(update)
        lost = update.numpy() < half_unit.numpy()
        self.updates += update.numel() if moved is None else int(np.count_nonzero(moved))
        self.stagnated += int(np.count_nonzero(lost if moved is None else lost & moved))


def _square(tensor: Tensor) -> float:
    """Return the sum of the squares of a contiguous tensor: in one pass, not in two."""
    return float(torch.dot(tensor.view(-1), tensor.view(-1)))


def drop_negligible(gradient: Tensor) -> None:
    """Set the elements of a float64 gradient that are below `NEGLIGIBLE` of its largest to 0, in place."""
    low, high = gradient.aminmax()
    bound = max(-float(low), float(high)) * NEGLIGIBLE
    for part in pieces(gradient) if gradient.is_contiguous() else [gradient]:
        part.copy_(F.hardshrink(part, bound))


def parts(sketch: Sketch, rows: Tensor | None) -> list[tuple[slice, slice | Tensor]]:
    """Return parts of a gradient that has `rows` of a tensor (None: all), and where in the tensor each part is."""
    if rows is not None:
        return [(slice(None), rows)]
    return [(part, part) for part in sketch.slices(CACHED_ELEMENTS)]


def pieces(tensor: Tensor, elements: int = CACHED_ELEMENTS) -> Iterator[Tensor]:
    """Return the elements of `tensor`, `elements` at a time; parts of its memory where it is contiguous."""
    flat = tensor.reshape(-1)
    return (flat[start : start + elements] for start in range(0, len(flat), elements))


def as_matrix(tensor: Tensor) -> Tensor:
    """Return `tensor` with its first dimension as rows and the others as columns."""
    return tensor.reshape(len(tensor), -1)
