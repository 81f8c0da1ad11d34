"""Numbers that a loop gives to the record: floats, tensors of one element, or anything else by mistake."""

import math
import numbers
from typing import Any

from torch import Tensor

from roundoff.errors import UsageError, described
from roundoff.runs.reading import LARGEST_FLOAT32


def number(name: str, value: Any) -> Tensor | float:
    """Return `value` as a float, or as a detached tensor of one element, which stays on its device.

    Args:
        name: with which the error begins.
        value: a number, or a tensor or array of one element.

    Raises:
        UsageError: it is something else.
    """
    if isinstance(value, Tensor):
        if value.numel() == 1 and not value.is_complex():
            return value.detach()
    elif hasattr(value, "item") and getattr(value, "size", 0) == 1:  # an array or a number of NumPy
        value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if round(value) > 0 else -math.inf
    what = "a complex tensor" if isinstance(value, Tensor) and value.is_complex() else described(value)
    raise UsageError(f"{name} is {what}; give one number")


def loss_number(name: str, value: Any) -> float:
    """Return `value` as a float, which is infinite where fp32 cannot hold it; see `number`."""
    found = float(number(name, value))
    return math.copysign(math.inf, found) if abs(found) > LARGEST_FLOAT32 else found
