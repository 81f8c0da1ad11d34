"""Installs the casts of O1, and wraps and registers functions of the user's."""

from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch

from apex_compat.amp import rnn_compat, wrap
from apex_compat.amp._amp_state import _amp_state
from apex_compat.amp.handle import AmpHandle, NoOpHandle
from apex_compat.amp.lists import functional_overrides, tensor_overrides, torch_overrides

_registered: list[tuple[Any, str, wrap.Rule]] = []


def half_function(fn: wrap.Function) -> wrap.Function:
    """Decorate a function so that its floating point arguments are cast to half precision while O1 is on."""
    return _decorated(wrap.half, fn)


def float_function(fn: wrap.Function) -> wrap.Function:
    """Decorate a function so that its floating point arguments are cast to float32 while O1 is on."""
    return _decorated(wrap.floating, fn)


def promote_function(fn: wrap.Function) -> wrap.Function:
    """Decorate a function so that a mix of half precision and float32 becomes float32 while O1 is on."""
    return _decorated(wrap.promote, fn)


def _decorated(rule: wrap.Rule, fn: wrap.Function) -> wrap.Function:
    return rule(fn, getattr(fn, "__name__", type(fn).__name__))


def register_half_function(module: Any, name: str) -> None:
    """Let the next `initialize` with O1 patch a function as `half_function` does.

    Args:
        module: the module or class that has it.
        name: its name there.

    Raises:
        ValueError: `module` has no such name.
    """
    _register(module, name, wrap.half)


def register_float_function(module: Any, name: str) -> None:
    """Let the next `initialize` with O1 patch a function as `float_function` does. See `register_half_function`."""
    _register(module, name, wrap.floating)


def register_promote_function(module: Any, name: str) -> None:
    """Let the next `initialize` with O1 patch a function as `promote_function` does. See `register_half_function`."""
    _register(module, name, wrap.promote)


def _register(module: Any, name: str, rule: wrap.Rule) -> None:
    if not hasattr(module, name):
        raise ValueError(f"No function named {name} in module {module}.")
    if (module, name, rule) not in _registered:
        _registered.append((module, name, rule))


def init(
    enabled: bool = True,
    loss_scale: float | str = "dynamic",
    enable_caching: bool = True,
    verbose: bool = False,
    allow_banned: bool = False,
) -> AmpHandle | NoOpHandle:
    """Switch on the casts of O1, for scripts of the interface before `amp.initialize`.

    Args:
        enabled: False returns a handle that does nothing.
        loss_scale: "dynamic" or a number, for the optimizers of `handle.wrap_optimizer`.
        enable_caching: True casts a weight once for all its uses between two steps.
        verbose: True prints each cast.
        allow_banned: True computes F.binary_cross_entropy in float32 instead of refusing half precision.

    Returns:
        The handle. Its `_deactivate()` puts all functions back.
    """
    deactivate()
    handle = AmpHandle(loss_scale, enable_caching, verbose) if enabled else NoOpHandle()
    _amp_state.handle = handle
    if isinstance(handle, AmpHandle):
        install(handle, allow_banned)
    return handle


def deactivate() -> None:
    """Put all functions back that an earlier `initialize` or `init` patched."""
    if hasattr(_amp_state, "handle"):
        _amp_state.handle._deactivate()


def install(handle: AmpHandle, allow_banned: bool = False) -> None:
    """Patch every function of the table until `handle` is deactivated: the user's first, so that they are inside."""
    for owner, name, rule in (*_registered, *rules(allow_banned)):
        handle.patch(owner, name, _named(rule(getattr(owner, name), name), owner, name))
    rnn_compat.patch_rnns(handle)


def rules(allow_banned: bool = False) -> Iterator[tuple[Any, str, wrap.Rule]]:
    """Yield the table of O1: module or class, name, rule."""
    banned = wrap.floating if allow_banned else wrap.refuse_bce
    table: list[tuple[Any, list[str], wrap.Rule]] = [
        (torch, torch_overrides.FP16_FUNCS, wrap.half),
        (torch, torch_overrides.FP32_FUNCS, wrap.floating),
        (torch, torch_overrides.CASTS, wrap.promote),
        (torch, torch_overrides.SEQUENCE_CASTS, wrap.sequence_promote),
        (torch, torch_overrides.IN_PLACE_FP32_FUNCS, wrap.refuse_half),
        (torch.nn.functional, functional_overrides.FP16_FUNCS, wrap.half),
        (torch.nn.functional, functional_overrides.FP32_FUNCS, wrap.floating),
        (torch.nn.functional, functional_overrides.CASTS, wrap.promote),
        (torch.nn.functional, functional_overrides.BANNED_FUNCS, banned),
        (torch.Tensor, tensor_overrides.FP16_FUNCS, wrap.half),
        (torch.Tensor, tensor_overrides.FP32_FUNCS, wrap.floating),
        (torch.Tensor, tensor_overrides.CASTS, wrap.promote),
        (torch.Tensor, tensor_overrides.IN_PLACE_FP32_FUNCS, wrap.refuse_half_self),
        (torch.Tensor, tensor_overrides.IN_PLACE_MATCHED_FUNCS, wrap.match_self),
    ]
    for owner, names, rule in table:
        for name in names:
            yield owner, name, rule


def _named(function: Any, owner: Any, name: str) -> Any:
    """Name `function` so that pickle finds it where it is patched in: a layer of a model may hold F.gelu."""
    if isinstance(owner, ModuleType):
        function.__module__, function.__qualname__ = owner.__name__, name
    elif isinstance(owner, type):
        function.__module__, function.__qualname__ = owner.__module__, f"{owner.__qualname__}.{name}"
    return function
