"""Casts what goes into a model and comes out of it, in calls of the model and of its `forward`."""

import copy
from collections import deque
from collections.abc import Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn


def cast_forward(model: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype) -> None:
    """Let `model` cast its floating point inputs, unless `inputs` is None, and outputs."""
    cast = CastForward(model, inputs, outputs)
    vars(model).update({"forward": cast, "_replicate_for_data_parallel": cast.replicate})


def uncast_forward(module: nn.Module) -> None:
    """Undo `cast_forward`, if it was called for `module`."""
    attributes = vars(module)
    cast = attributes.get("forward")
    if isinstance(cast, CastForward):
        del attributes["forward"], attributes["_replicate_for_data_parallel"]
        if cast.own is not None:
            attributes["forward"] = cast.own


class CastForward:
    """Stands as the attribute `forward` of a model.

    Scripts call `model(x)` or `model.forward(x)`. As under apex, the model's forward pre-hooks see the inputs as they
    were given, and its forward hooks see cast outputs. Copies and pickles of the model have one of their own.

    Args:
        model: the model.
        inputs: the dtype of its floating point inputs. None leaves them as they are.
        outputs: the dtype of its floating point outputs. The loss is then computed in it.

    Attributes:
        own: the attribute `forward` that a script had given the model, or None.
    """

    def __init__(self, model: nn.Module, inputs: torch.dtype | None, outputs: torch.dtype) -> None:
        self.model = model
        self.inputs = inputs
        self.outputs = outputs
        self.own = vars(model).get("forward")

    @property
    def __wrapped__(self) -> Any:
        """Return the model's method `forward`. `inspect.signature` looks for it here."""
        return MethodType(type(self.model).forward, self.model) if self.own is None else self.own

    @property
    def __code__(self) -> Any:
        """Return the code of the model's method. torch.export names its place in messages."""
        return self.__wrapped__.__code__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the model makes of cast arguments, cast."""
        if self.inputs is not None:
            args, kwargs = applier(args, self.inputs), applier(kwargs, self.inputs)
        if self.own is None:  # torch.compile does not know MethodType
            return applier(type(self.model).forward(self.model, *args, **kwargs), self.outputs)
        return applier(self.own(*args, **kwargs), self.outputs)

    def replicate(self) -> nn.Module:
        """Return a replica of the model, as torch's DataParallel asks for, that runs its own weights."""
        replica: nn.Module = type(self.model)._replicate_for_data_parallel(self.model)  # type: ignore[no-untyped-call]
        uncast_forward(replica)
        cast_forward(replica, self.inputs, self.outputs)
        return replica


def applier(value: Any, dtype: torch.dtype) -> Any:
    """Return `value` with every floating point tensor in it cast to `dtype`.

    Lists, tuples, sets and mappings are copied, with their types. So is what has a method `to`, by `to(dtype)`.
    The rest, such as strings and NumPy arrays, is returned itself.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() else value
    if hasattr(value, "to"):
        return value.to(dtype)
    if isinstance(value, Mapping):
        return _apply_to_mapping(value, dtype)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(applier(item, dtype) for item in value))
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return type(value)(applier(item, dtype) for item in value)
    return value


def _apply_to_mapping(value: Mapping[Any, Any], dtype: torch.dtype) -> Any:
    items = {applier(key, dtype): applier(item, dtype) for key, item in value.items()}
    if type(value) is dict or not hasattr(value, "__setitem__"):
        return items
    # Classes such as the outputs of transformers have attributes too, which a plain dict would lose.
    changed: Any = copy.copy(value)
    for key, item in items.items():
        changed[key] = item
    return changed
