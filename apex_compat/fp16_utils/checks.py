"""Checks arguments. Each error names the argument, the value received and what is allowed."""

from collections.abc import Iterable
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_compat.fp16_utils.wrapper import OptimizerWrapper

HALF_DTYPES = (torch.float16, torch.bfloat16)

SMALLEST_SCALE = 2.0**-100
"""Bounds every loss scale from below.

Divided by a smaller one, a finite float16 could leave float32. From 0 a dynamic scale could never grow again.
"""
LARGEST_SCALE = 2.0**127
"""Bounds every loss scale from above: the largest power of two in float32."""


def checked_scale(name: str, value: Any) -> float:
    """Return `value` as a float, if it can be a loss scale.

    Args:
        name: the argument's name in an error.
        value: a number, or a tensor of one element.

    Raises:
        TypeError: `value` is not a number (a bool and a string are not).
        ValueError: `value` is nan, or outside of [2**-100, 2**127].
    """
    if isinstance(value, Tensor) and value.numel() == 1:
        value = value.item()
    allowed = "a finite number from 2**-100 to 2**127"
    if not SMALLEST_SCALE <= _number(name, value, allowed) <= LARGEST_SCALE:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return float(value)


def checked_count(name: str, value: Any, smallest: int) -> int:
    """Return `value`, if it is an int of at least `smallest`.

    Raises:
        TypeError: `value` is not an int (a bool is not).
        ValueError: `value` is smaller.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} is {value!r}; it must be an int of at least {smallest}")
    if value < smallest:
        raise ValueError(f"{name} is {value!r}; it must be at least {smallest}")
    return value


def checked_factor(name: str, value: Any) -> float:
    """Return `value` as a float, if it is in (1, 2**127].

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is nan or out of range.
    """
    allowed = "a finite number greater than 1"
    if not 1.0 < _number(name, value, allowed) <= LARGEST_SCALE:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")
    return float(value)


def checked_max_norm(value: Any) -> float:
    """Return `value` as a float, if it is at least 0 (inf is).

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is nan or negative.
    """
    allowed = "a number of at least 0"
    if not _number("max_norm", value, allowed) >= 0:
        raise ValueError(f"max_norm is {value!r}; it must be {allowed}")
    return float(value)


def checked_norm_type(value: Any) -> float:
    """Return `value` as a float, if it is above 0 (inf is).

    Raises:
        TypeError: `value` is not a number.
        ValueError: `value` is nan, 0 or negative.
    """
    allowed = "a number greater than 0, such as 2 or inf"
    if not _number("norm_type", value, allowed) > 0:
        raise ValueError(f"norm_type is {value!r}; it must be {allowed}")
    return float(value)


def checked_loss(loss: Any) -> Tensor:
    """Return `loss`, if it is one floating point number that requires grad.

    Raises:
        TypeError: `loss` is not a tensor.
        ValueError: its number of elements, dtype or requires_grad is another.
    """
    if not isinstance(loss, Tensor):
        raise TypeError(f"loss is a {type(loss).__name__}; it must be a tensor of one element")
    if loss.numel() != 1 or not loss.is_floating_point() or not loss.requires_grad:
        raise ValueError(
            f"loss has shape {tuple(loss.shape)}, dtype {loss.dtype} and requires_grad={loss.requires_grad}; "
            "it must be one floating point number that requires grad"
        )
    return loss


def checked_optimizer(optimizer: Any) -> torch.device:
    """Return the device of the optimizer's first parameter.

    Raises:
        TypeError: `optimizer` is not a torch optimizer or is wrapped already, or a parameter has another
            dtype than float16, bfloat16 or float32.
        ValueError: `optimizer` has no parameters.
    """
    if not isinstance(optimizer, Optimizer) or isinstance(optimizer, OptimizerWrapper):
        kind = type(optimizer).__name__
        raise TypeError(f"init_optimizer is a {kind}; it must be a torch optimizer, not yet wrapped")
    params = [p for group in optimizer.param_groups for p in group["params"]]
    if not params:
        raise ValueError("init_optimizer has no parameters; it must have at least one")
    check_dtypes("init_optimizer", params)
    return torch.device(params[0].device)


def check_dtypes(name: str, params: Iterable[Any]) -> None:
    """Raise TypeError unless `params`, given as `name`, are float16, bfloat16 or float32 tensors."""
    for param in params:
        if not isinstance(param, Tensor) or param.dtype not in (*HALF_DTYPES, torch.float32):
            kind = param.dtype if isinstance(param, Tensor) else type(param).__name__
            raise TypeError(f"{name} has a parameter of {kind}; allowed are float16, bfloat16, float32")


def _number(name: str, value: Any, allowed: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} is {value!r}; it must be {allowed}")
    return float(value)
