"""Turn values into JSON text. It has its own module, since programs without the base dependencies write JSON too."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def to_json(value: Any, indent: int | None = None) -> str:
    """Return `value` as JSON; floats keep every bit, and those that JSON lacks become "inf", "-inf" and "nan".

    A tensor or array without dimensions is its number, and a dtype of torch its name, such as "float16".
    """
    return json.dumps(_plain(value), indent=indent, allow_nan=False, ensure_ascii=False)


def _plain(value: Any) -> Any:
    value = scalar(value)
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return str(value) if isinstance(value, Path) else value


def scalar(value: Any) -> Any:
    """Return the number of a tensor or array that has no dimensions, and the name of a dtype; else `value`."""
    if type(value).__name__ == "dtype":
        return str(value).removeprefix("torch.")
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:  # asked so, since torch takes seconds to import
        return value.item()
    return value
