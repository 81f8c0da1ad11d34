"""Casts the recurrent functions for O1, through the one place where torch.nn's modules look for them."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch

from apex_compat.amp import wrap
from apex_compat.amp.handle import AmpHandle
from apex_compat.amp.utils import casts, uncached_half

RNN_NAMES = ["rnn_relu", "rnn_tanh", "gru", "lstm"]
CELL_NAMES = [f"{name}_cell" for name in RNN_NAMES]


class VariableFunctionsShim:
    """Stands before torch's module of recurrent functions, and has wrappers of those that O1 casts."""

    def __init__(self, functions: Any) -> None:
        self._functions = functions
        for name in RNN_NAMES:
            setattr(self, name, half_rnn(getattr(functions, name), name))
        for name in CELL_NAMES:
            setattr(self, name, wrap.half(getattr(functions, name), name))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._functions, name)


def half_rnn(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Cast input, hidden state and all weights to half precision, each time anew.

    The casts of weights are not kept: a layer uses each of its weights for the whole sequence in one call.
    """

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*(uncached_half(args, name) if casts.on else args), **kwargs)

    return wrapper


def check_any_dtype(check: Callable[..., None]) -> Callable[..., None]:
    """Let the check of a recurrent module accept an input of another dtype than its weights': both will be cast."""

    @wraps(check)
    def wrapper(self: Any, input: Any, batch_sizes: Any) -> None:
        if casts.on:
            weight = self._flat_weights[0]
            input = weight.new_empty(()).expand(input.shape)  # checked in its shape alone
        check(self, input, batch_sizes)

    return wrapper


def patch_rnns(handle: AmpHandle) -> None:
    """Let the recurrent modules of torch.nn find the wrappers until `handle` is deactivated."""
    module: Any = torch.nn.modules.rnn
    handle.patch(module, "_VF", VariableFunctionsShim(module._VF))
    handle.patch(torch.nn.RNNBase, "check_input", check_any_dtype(torch.nn.RNNBase.check_input))
