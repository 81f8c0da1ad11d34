"""Numbers that a loop gives to the record: floats, tensors of one element, or anything else by mistake."""

import math
import numbers
from typing import Any

from torch import Tensor

from roundoff.errors import UsageError, described
from roundoff.runs.json_text import scalar
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
            return value.detach() if value.requires_grad else value
    elif hasattr(value, "item") and getattr(value, "size", 0) == 1:  # an array or a number of NumPy
        value = value.item()
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return math.inf if abs(value) == value else -math.inf
    what = "a complex tensor" if isinstance(value, Tensor) and value.is_complex() else described(value)
    raise UsageError(f"{name} is {what}; give one number")


def loss_number(name: str, value: Any) -> float:
    """Return `value` as a float, which is infinite where fp32 cannot hold it; see `number`."""
    found = float(number(name, value))
    return math.copysign(math.inf, found) if abs(found) > LARGEST_FLOAT32 else found


def whole_number(name: str, value: Any) -> int:
    """Return `value` as an int that the reader takes; errors are those of `number`."""
    found = scalar(value)
    if type(found) is not int or not 0 <= found < 2**63:  # a bool is an int to isinstance
        raise UsageError(f"{name} is {described(value)}; give a whole number")
    return found
