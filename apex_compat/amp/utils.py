"""Casts tensors for O1: the switch, the cache of cast weights, and the casts themselves."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch import is_grad_enabled as has_grad
from torch.nn import Parameter

FLOATING = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""The dtypes that O1 casts from."""

_SHORT = {torch.float16: "Half", torch.bfloat16: "BFloat16", torch.float32: "Float", torch.float64: "Double"}


class Casts:
    """Holds what the wrapped functions of O1 look at in each call.

    Attributes:
        on: True if they cast.
        handle: the handle that installed them, or None.
        half: the dtype of half precision, float16 or bfloat16.
        device_types: the types of the devices whose tensors are cast.
        caching: True keeps the casts of weights.
        cache: by the id of a parameter, its version and requires_grad when it was cast, the cast, and the parameter
            itself, without which another tensor could get the id. A weight that is used twice is cast once, and its
            two gradients are summed before they are cast back.
        verbose: True prints each cast.
    """

    __slots__ = ("cache", "caching", "device_types", "half", "handle", "on", "verbose")

    def __init__(self) -> None:
        self.on = False
        self.handle: object = None
        self.half = torch.float16
        self.device_types: frozenset[str] = frozenset()
        self.caching = True
        self.cache: dict[int, tuple[int, bool, Tensor, Parameter]] = {}
        self.verbose = False


casts = Casts()


@contextmanager
def casts_disabled() -> Iterator[None]:
    """Let the wrapped functions be what they were, within this context. Without O1 it does nothing."""
    before, handle, casts.on = casts.on, casts.handle, False
    try:
        yield
    finally:
        if casts.handle is handle:  # a new one is on, and with none all is off
            casts.on = before


def half_of_casts(device_type: str) -> torch.dtype | None:
    """Return the half precision to which O1 casts tensors on such a device here; None where it casts nothing."""
    return casts.half if casts.on and device_type in casts.device_types else None


def maybe_half(value: Any, name: str = "") -> Any:
    """Return `value` in half precision, the cast of a parameter from the cache.

    Lists and tuples are looked into. Whatever is no floating point tensor on the devices in question is
    returned itself.

    Args:
        value: any argument of a function.
        name: the function, for the line that verbose=True prints.
    """
    if type(value) is Parameter:
        entry = casts.cache.get(id(value))  # the hash of a tensor is a call of Python's
        if entry and entry[0] == value._version and entry[1] is value.requires_grad and has_grad():
            return entry[2]
        return _new_half(value, name)
    if isinstance(value, (list, tuple)):
        return _each(value, maybe_half, name)
    return _cast(value, casts.half, name) if _is_cast_from(value, casts.half) else value


def uncached_half(value: Any, name: str = "") -> Any:
    """Return `value` as `maybe_half` does, but each time a new cast."""
    if isinstance(value, (list, tuple)):
        return _each(value, uncached_half, name)
    return _cast(value, casts.half, name) if _is_cast_from(value, casts.half) else value


def maybe_float(value: Any, name: str = "") -> Any:
    """Return `value` in float32. Otherwise as `maybe_half`, without a cache."""
    if isinstance(value, (list, tuple)):
        return _each(value, maybe_float, name)
    return _cast(value, torch.float32, name) if _is_cast_from(value, torch.float32) else value


def maybe_like(value: Any, dtype: torch.dtype, name: str = "") -> Any:
    """Return `value` in `dtype`, if both are floating point and `value` is a tensor on the devices in question."""
    return _cast(value, dtype, name) if dtype in FLOATING and _is_cast_from(value, dtype) else value


def _is_cast_from(value: Any, dtype: torch.dtype) -> bool:
    """Return True if `value` is a tensor that a cast to `dtype` concerns."""
    found = getattr(value, "dtype", None)
    if found is dtype or found not in FLOATING:
        return False
    # A model may have a dtype and a device as well.
    return isinstance(value, Tensor) and value.device.type in casts.device_types


def _cast(value: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    if casts.verbose:
        print(f"{_SHORT[value.dtype]}->{_SHORT[dtype]} ({name})")
    return value.to(dtype)


def _new_half(param: Parameter, name: str) -> Tensor:
    if not _is_cast_from(param, casts.half):
        return param
    cast = _cast(param, casts.half, name)
    # In evaluation the cache is not used. Moving averages swap weights there through `.data`, which leaves no trace.
    if casts.caching and has_grad() and not param.is_inference():
        casts.cache[id(param)] = (param._version, param.requires_grad, cast, param)
    return cast


def _each(values: Any, cast: Callable[[Any, str], Any], name: str) -> Any:
    """Return a list or tuple with each item cast, of the same type; `values` itself if nothing was cast."""
    items = [cast(value, name) for value in values]
    if all(new is old for new, old in zip(items, values, strict=True)):
        return values
    return type(values)(*items) if hasattr(values, "_fields") else type(values)(items)


def is_mixed(values: Any) -> bool:
    """Return True if the floating point tensors in `values` are of half precision and float32, and no third dtype."""
    first = None
    for value in values:
        dtype = getattr(value, "dtype", None)
        if dtype is not None and dtype is not first:
            if first is not None:
                return {v.dtype for v in values if isinstance(v, Tensor)} & FLOATING == {casts.half, torch.float32}
            first = dtype
    return False


def has_half(values: Any) -> bool:
    """Return True if one of `values`, or of the lists and tuples in it, is a tensor of half precision."""
    return any(
        has_half(value)
        if isinstance(value, (list, tuple))
        else getattr(value, "dtype", None) is casts.half and isinstance(value, Tensor)
        for value in values
    )
