"""Has apex's names for what depended on the version of torch."""

from typing import Any

from torch import is_floating_point
from torch import is_tensor as is_tensor_like

from apex_compat.fp16_utils import to_python_float as scalar_python_val

__all__ = ["filter_attrs", "is_floating_point", "is_tensor_like", "scalar_python_val"]


def filter_attrs(module: Any, attrs: list[str]) -> list[str]:
    """Return those of `attrs` that `module`, or a class, has."""
    return [name for name in attrs if hasattr(module, name)]
