"""Holds the rules of O1. Each takes a function and its name, and returns the function that casts its arguments first.

A rule keys on dtypes alone, and does nothing to arguments that are cast already. A wrapper may therefore be entered
twice in one call. A model calls wrappers all the time: what most calls need is in the wrapper itself, without a call.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from apex_compat.amp.utils import casts, has_half, is_mixed, maybe_float, maybe_half, maybe_like

Function = Callable[..., Any]
Rule = Callable[[Function, str], Function]


def half(function: Function, name: str) -> Function:
    """Cast all floating point arguments to half precision, weights through the cache."""

    @wraps(function)
    def wrapper(*given: Any, **kwargs: Any) -> Any:
        args: Any = given
        if casts.on:
            dtype = casts.half
            for i, arg in enumerate(given):
                if getattr(arg, "dtype", None) is not dtype:
                    if args is given:
                        args = list(given)
                    args[i] = maybe_half(arg, name)
            if kwargs:
                kwargs = _cast_kwargs(maybe_half, kwargs, name)
        return function(*args, **kwargs)

    return wrapper


def floating(function: Function, name: str) -> Function:
    """Cast all floating point arguments to float32: in half precision the function loses digits or overflows."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.on:
            for arg in args:
                if getattr(arg, "dtype", None) is not torch.float32:
                    args = tuple([maybe_float(a, name) for a in args])
                    break
            if kwargs:
                kwargs = _cast_kwargs(maybe_float, kwargs, name)
        return function(*args, **kwargs)

    return wrapper


def promote(function: Function, name: str) -> Function:
    """Cast all floating point arguments to float32 if some are half precision and some float32.

    Mixes with a third dtype are left to torch's own promotion.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.on and is_mixed((*args, *kwargs.values()) if kwargs else args):
            args = tuple([maybe_float(arg, name) for arg in args])
            kwargs = _cast_kwargs(maybe_float, kwargs, name)
        return function(*args, **kwargs)

    return wrapper


def sequence_promote(function: Function, name: str) -> Function:
    """Promote the tensors in the list or tuple that is the first argument."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.on:
            if args and is_mixed(args[0]):
                args = (maybe_float(args[0], name), *args[1:])
            elif is_mixed(kwargs.get("tensors", ())):
                kwargs["tensors"] = maybe_float(kwargs["tensors"], name)
        return function(*args, **kwargs)

    return wrapper


def match_self(method: Function, name: str) -> Function:
    """Cast the other floating point arguments of an in-place method to the dtype of the tensor it writes to."""

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if casts.on:
            dtype = self.dtype
            for arg in args:
                if getattr(arg, "dtype", dtype) is not dtype:
                    args = tuple([maybe_like(a, dtype, name) for a in args])
                    break
            if kwargs:
                kwargs = {key: maybe_like(value, dtype, name) for key, value in kwargs.items()}
        return method(self, *args, **kwargs)

    return wrapper


def refuse_half(function: Function, name: str) -> Function:
    """Refuse half precision in an in-place function that needs float32: it cannot return another tensor."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.on and has_half((*args, *kwargs.values())):
            raise NotImplementedError(
                f"Cannot call in-place function {name} with fp16 arguments under amp O1: "
                f"call {name.rstrip('_')}, which returns float32, or cast the arguments with .float()"
            )
        return function(*args, **kwargs)

    return wrapper


def refuse_half_self(method: Function, name: str) -> Function:
    """Refuse half precision in the tensor that an in-place method of float32 writes to."""

    @wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if casts.on and self.dtype is casts.half:
            raise NotImplementedError(
                f"Cannot call in-place method {name} on fp16 tensors under amp O1: "
                f"call {name.rstrip('_')}, which returns float32, or cast the tensor with .float()"
            )
        return method(self, *args, **kwargs)

    return wrapper


def refuse_bce(function: Function, name: str) -> Function:
    """Refuse half precision in a loss of probabilities: near 0 and 1 half precision cannot tell them from 0 and 1."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if casts.on and has_half((*args, *kwargs.values())):
            raise NotImplementedError(
                f"amp does not work out-of-the-box with {name}, which needs the output of torch.sigmoid in float32.\n"
                "Merge sigmoid and loss: torch.nn.BCEWithLogitsLoss, or F.binary_cross_entropy_with_logits, is safe.\n"
                "Or cast the probabilities yourself and compute this loss within `with amp.disable_casts():`.\n"
                "Or, in a script with amp.init, pass allow_banned=True: the loss is then computed in float32."
            )
        return function(*args, **kwargs)

    return wrapper


def _cast_kwargs(cast: Callable[[Any, str], Any], kwargs: dict[str, Any], name: str) -> dict[str, Any]:
    # A cast `out` would be a new tensor, and the result would be lost. torch refuses one of another dtype.
    return {key: value if key == "out" else cast(value, name) for key, value in kwargs.items()}
