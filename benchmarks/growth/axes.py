"""The description of an axis along which cost grows."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from benchmarks.measure import Cost


@dataclass(frozen=True)
class GrowthAxis:
    """One size that grows while all others stay.

    Attributes:
        label: what the size is, for the picture.
        values: that are measured.
        measure: returns what each variant takes at one of them, by name.
        title: of a panel of its own; "" where time and memory have panels in the rows of the trainers.
    """

    label: str
    values: tuple[int, ...]
    measure: Callable[[int], Mapping[str, Cost]]
    title: str = ""
