"""Optimizers of torch that do their work without `torch._dynamo`, the front end of torch.compile.

torch marks the methods of its optimizers for the compiler. The first call of a marked method imports `torch._dynamo`,
also where nothing is ever compiled: 0.5 to 0.9 s and 70 MiB in every process. A trainer compiles nothing. Its
optimizers are of subclasses that call what the marks are around. Nothing of torch itself changes, so whoever compiles
in the same process finds torch as it was.
"""

import functools
from collections.abc import Callable
from types import CodeType
from typing import Any

import torch
from torch.optim import Optimizer, optimizer

METHODS = ("add_param_group", "load_state_dict", "state_dict", "step", "zero_grad")


@functools.cache
def eager(kind: type[Optimizer]) -> type[Optimizer]:
    """Return a subclass of `kind` that has its name and its numbers, and imports no `torch._dynamo`.

    A method that this torch marks in a way not known here is left to torch.
    """
    found = {name: _unmarked(getattr(kind, name)) for name in METHODS}
    methods = {name: method for name, method in found.items() if method is not None}
    return type(kind.__name__, (kind,), {"__doc__": kind.__doc__, "__module__": kind.__module__, **methods})


def _unmarked(method: Any) -> Callable[..., Any] | None:
    """Return what `method` is without marks of the compiler; None where none is outside."""
    disabled = _code_of(torch, "_disable_dynamo")
    graph_breaks = _code_of(optimizer, "_use_grad_for_differentiable")
    profiled = _code_of(Optimizer, "profile_hook_step")  # an optimizer gives it to its class, and to a new one again
    found = set()
    while hasattr(method, "__wrapped__") and method.__code__ in (disabled, graph_breaks, profiled):
        found.add(method.__code__)
        method = method.__wrapped__
    if not found & {disabled, graph_breaks}:
        return None
    return _in_its_grad_mode(method) if graph_breaks in found else method


def _code_of(owner: Any, decorator: str) -> CodeType | None:
    """Return the code of whatever a decorator of torch makes; None where this torch has no such decorator."""
    decorate = getattr(owner, decorator, None)
    return None if decorate is None else decorate(lambda self: None).__code__


def _in_its_grad_mode(step: Callable[..., Any]) -> Callable[..., Any]:
    """Return `step` as it is between its graph breaks: it records gradients only for a differentiable optimizer."""

    @functools.wraps(step)
    def stepping(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return step(self, *args, **kwargs)

    return stepping
