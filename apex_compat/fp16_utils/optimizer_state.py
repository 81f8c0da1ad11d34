"""Checks a whole state dict before any of it is loaded."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_compat.fp16_utils.policy import DynamicScale, StaticScale, policy_from_state

KEYS = (
    "loss_scaler",
    "dynamic_loss_scale",
    "overflow",
    "first_closure_call_this_step",
    "optimizer_state_dict",
    "fp32_from_fp16",
)

# The state of torch's optimizers that has one number for each number of its parameter.
ELEMENTWISE = {"momentum_buffer", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "square_avg", "grad_avg", "sum"}


def checked(
    state: Any, optimizer: Optimizer, masters: Sequence[list[list[Tensor]]], device: torch.device
) -> tuple[StaticScale | DynamicScale, list[list[Tensor]]]:
    """Check that `state` fits `optimizer` and one of `masters`.

    Args:
        state: as `FP16_Optimizer.state_dict` returns it.
        optimizer: the wrapped optimizer.
        masters: lists of masters, group by group, any of which may be in the state.
        device: where the loss scale goes.

    Returns:
        The loss scale policy that `state` describes, and the first of `masters` that it fits.

    Raises:
        TypeError: a value has another type.
        ValueError: a key is missing or unknown, a value is out of range, or groups or shapes differ.
    """
    if not isinstance(state, dict):
        raise TypeError(f"state_dict is a {type(state).__name__}; it must be a dict with the keys {KEYS}")
    if set(state) != set(KEYS):
        raise ValueError(f"state_dict has the keys {tuple(state)}; it must have {KEYS}")
    for key in ("dynamic_loss_scale", "overflow", "first_closure_call_this_step"):
        if not isinstance(state[key], bool):
            raise TypeError(f"state_dict[{key!r}] is {state[key]!r}; it must be True or False")
    policy = policy_from_state(state["loss_scaler"], device)
    if policy.dynamic != state["dynamic_loss_scale"]:
        kind = "dynamic" if policy.dynamic else "static"
        raise ValueError(
            f"state_dict['dynamic_loss_scale'] is {state['dynamic_loss_scale']}, its 'loss_scaler' is {kind}"
        )
    fitting = _fitting(state["fp32_from_fp16"], masters)
    _check_optimizer_state(state["optimizer_state_dict"], optimizer)
    return policy, fitting


def _fitting(saved: Any, masters: Sequence[list[list[Tensor]]]) -> list[list[Tensor]]:
    if not isinstance(saved, list) or not all(isinstance(group, list | tuple) for group in saved):
        raise TypeError("state_dict['fp32_from_fp16'] must be a list of lists of tensors, one list for each group")
    if not all(isinstance(tensor, Tensor) for group in saved for tensor in group):
        raise TypeError("state_dict['fp32_from_fp16'] must hold tensors only")
    got = _shapes(saved)
    for candidate in masters:
        if _shapes(candidate) == got:
            return candidate
    expected = _shapes(masters[0])
    where = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), None)
    detail = f"{len(got)} groups, not {len(expected)}"
    if where is not None:
        detail = f"the shapes {got[where]} in group {where}, not {expected[where]}"
    raise ValueError(f"state_dict['fp32_from_fp16'] has {detail}; it is of another model or other groups")


def _shapes(groups: list[list[Tensor]]) -> list[list[tuple[int, ...]]]:
    return [[tuple(tensor.shape) for tensor in group] for group in groups]


def _check_optimizer_state(saved: Any, optimizer: Optimizer) -> None:
    name = "state_dict['optimizer_state_dict']"
    if not isinstance(saved, dict) or not {"state", "param_groups"} <= set(saved):
        raise TypeError(f"{name} must be a dict with the keys 'state' and 'param_groups'")
    sizes = [len(group["params"]) for group in saved["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    if sizes != expected:
        raise ValueError(f"{name} has groups of {sizes} parameters; the optimizer has {expected}")
    ids = chain.from_iterable(group["params"] for group in saved["param_groups"])
    params = chain.from_iterable(group["params"] for group in optimizer.param_groups)
    for index, param in zip(ids, params, strict=True):
        for key, value in saved["state"].get(index, {}).items():
            if key in ELEMENTWISE and isinstance(value, Tensor) and value.shape != param.shape:
                raise ValueError(
                    f"{name} has a {key} of shape {tuple(value.shape)} for parameter {index}; "
                    f"its shape must be {tuple(param.shape)}"
                )
