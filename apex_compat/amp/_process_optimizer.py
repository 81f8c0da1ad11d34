"""Teaches an optimizer to work under `scale_loss`: its gradients, its master weights, its skipped steps.

Each function here that takes `self` becomes a method of the optimizer, which stays the same object. The methods keep
their account in `optimizer._amp_stash`.
"""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from types import MethodType
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from apex_compat.amp._amp_state import maybe_print
from apex_compat.amp._grad_stash import put_grads_back, take_grads, unscale_and_add
from apex_compat.amp._half_grads import forget_scale, keeps_half_grads, post_half_grads
from apex_compat.amp.scaler import LossScaler
from apex_compat.amp.utils import casts, casts_disabled
from apex_compat.fp16_utils import gradients
from apex_compat.fp16_utils.checks import HALF_DTYPES, check_dtypes
from apex_compat.fp16_utils.masters import copy_to_unfrozen, followed, frozen_now, is_frozen, replace_by_masters

fp32_values: Any = WeakTensorKeyDictionary()
"""Maps half-precision parameters to fp32 values: their masters, or what `load_state_dict` read for masters to come."""


class AmpOptimizerState:
    """Holds what amp keeps of one optimizer.

    Attributes:
        lazy_init_called: True once the lists below are made.
        already_patched: True if the next step will be skipped.
        params_have_scaled_gradients: True after a `scale_loss` with delay_unscale=True.
        overflowed: the number and the scaler of the loss whose overflow will skip the next step.
        fp16_groups, fp32_from_fp16_groups: parameters in half precision and their masters, group by group.
        fp32_from_fp32_groups: the parameters of each group that are their own masters.
        all_fp16_params, all_fp32_from_fp16_params, all_fp32_from_fp32_params: the same without groups.
        all_fp32_params: without masters, where the lists with "from" are empty, what `all_fp16_params` has not.
        earlier_grads: within `scale_loss`, by parameter, the gradients from before it that no master has.
        frozen: half-precision parameters that were frozen when a backward pass began or ended, or a step began.
    """

    def __init__(self) -> None:
        self.lazy_init_called = False
        self.already_patched = False
        self.params_have_scaled_gradients = False
        self.overflowed: tuple[int, LossScaler] | None = None
        self.fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp16_groups: list[list[Tensor]] = []
        self.fp32_from_fp32_groups: list[list[Tensor]] = []
        self.all_fp16_params: list[Tensor] = []
        self.all_fp32_from_fp16_params: list[Tensor] = []
        self.all_fp32_from_fp32_params: list[Tensor] = []
        self.all_fp32_params: list[Tensor] = []
        self.earlier_grads: dict[Tensor, Tensor] = {}
        self.frozen: set[Tensor] = set()


def _process_optimizer(optimizer: Any, master_weights: bool | None) -> None:
    """Give `optimizer` the methods that `scale_loss` calls, in place.

    Args:
        optimizer: a torch optimizer, or anything with its methods and groups, such as LARC.
        master_weights: True keeps fp32 masters of its half-precision parameters.
    """
    optimizer._amp_stash = AmpOptimizerState()
    for name, method in (_WITH_MASTERS if master_weights else _WITHOUT_MASTERS).items():
        setattr(optimizer, name, MethodType(method, optimizer))
    overrides: dict[str, Callable[..., Any]] = {"step": _step, "add_param_group": _add_param_group}
    if master_weights:
        overrides |= {"step": _step_with_masters, "zero_grad": _zero_grad, "load_state_dict": _load_state_dict}
    for name, override in overrides.items():
        _override(optimizer, name, override)


def _override(optimizer: Any, name: str, override: Callable[..., Any]) -> None:
    """Replace a method by `override`, which gets the optimizer, the method as it was, and the arguments."""
    before = getattr(optimizer, name)

    # wraps() keeps the marks of schedulers, which otherwise warn of a replaced step. They need a bound method.
    @wraps(before)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return override(self, before, *args, **kwargs)

    setattr(optimizer, name, MethodType(method, optimizer))


# The step.


def mark_overflow(optimizer: Any, loss_id: int, scaler: LossScaler) -> None:
    """Make the next step of `optimizer` a skip, for the first overflow since the last step."""
    stash = optimizer._amp_stash
    if not stash.already_patched:
        stash.already_patched = True
        stash.overflowed = (loss_id, scaler)


def _step(self: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if self._amp_stash.already_patched:
        _refuse_closure(args, kwargs)
        return _skip(self)
    # The optimizer's own arithmetic is no business of O1.
    with casts_disabled():
        result = step(*args, **kwargs)
    casts.cache.clear()
    return result


def _step_with_masters(self: Any, step: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    _refuse_closure(args, kwargs)
    self._amp_lazy_init()
    _update_frozen(self._amp_stash)
    skipped = self._amp_stash.already_patched
    result = _step(self, step, *args, **kwargs)
    if not skipped:
        self._master_params_to_model_params()
        _drop_master_grads(self)
    return result


def _refuse_closure(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if (args and args[0] is not None) or kwargs.get("closure") is not None:
        raise RuntimeError(
            "amp does not support closures in step() with master weights or after an overflow: "
            "call backward within amp.scale_loss, then step() without a closure"
        )


def _skip(self: Any) -> None:
    stash = self._amp_stash
    loss_id, scaler = stash.overflowed
    change = "reducing loss scale to" if scaler.dynamic else "keeping the static loss scale"
    maybe_print(f"Gradient overflow.  Skipping step, loss scaler {loss_id} {change} {scaler.loss_scale()}")
    _drop_master_grads(self)
    forget_scale(self)
    # Without this a scheduler takes the skip for calls in the wrong order. That of LARC may have the inner optimizer.
    for each in (self, getattr(self, "optim", self)):
        each._opt_called = True
    stash.already_patched, stash.overflowed = False, None


def _drop_master_grads(self: Any) -> None:
    for master in self._amp_stash.all_fp32_from_fp16_params:
        master.grad = None


# With masters.


def _make_masters(self: Any) -> None:
    """Replace the half-precision parameters in all groups by masters, unless that was done."""
    stash = self._amp_stash
    if not stash.lazy_init_called:
        stash.lazy_init_called = True
        _adopt(self, *self.param_groups)


def _adopt(optimizer: Any, *groups: dict[str, Any]) -> None:
    stash = optimizer._amp_stash
    state_moved = False
    for group in groups:
        check_dtypes("optimizer", group["params"])
        masters, moved = replace_by_masters(optimizer, group, _new_master)
        state_moved |= moved
        stash.frozen.update(filter(is_frozen, masters))
        stash.fp16_groups.append(list(masters))
        stash.fp32_from_fp16_groups.append(list(masters.values()))
        made = set(map(id, masters.values()))
        stash.fp32_from_fp32_groups.append([p for p in group["params"] if id(p) not in made])
    stash.all_fp16_params = list(chain.from_iterable(stash.fp16_groups))
    stash.all_fp32_from_fp16_params = list(chain.from_iterable(stash.fp32_from_fp16_groups))
    stash.all_fp32_from_fp32_params = list(chain.from_iterable(stash.fp32_from_fp32_groups))
    if state_moved:
        # Loading casts the moved state to the dtype of its master, by the optimizer's own rules.
        optimizer.load_state_dict(optimizer.state_dict())


@torch.no_grad()
def _new_master(half: Tensor) -> Tensor:
    known = fp32_values.get(half)
    # The values that a checkpoint had for the masters, where the parameter was not changed since.
    master = half.detach().float() if known is None else followed(known, half).detach()
    fp32_values[half] = master
    return master


def _update_frozen(stash: AmpOptimizerState) -> None:
    stash.frozen = frozen_now(stash.all_fp16_params, stash.all_fp32_from_fp16_params, stash.frozen)


@torch.no_grad()
def _prepare_with_masters(self: Any) -> None:
    """Clear the gradients of the model, so that the backward pass to come makes new ones at the loss scale."""
    self._amp_lazy_init()
    stash = self._amp_stash
    _update_frozen(stash)
    stash.earlier_grads = take_grads(stash.all_fp32_from_fp32_params)
    half_grads = take_grads(stash.all_fp16_params)
    if keeps_half_grads(self):  # elsewhere the masters have them, unscaled and in fp32
        stash.earlier_grads |= half_grads


@torch.no_grad()
def _post_with_masters(self: Any, scaler: LossScaler) -> None:
    """Unscale the new gradients in fp32, and add them to those of the masters and of the fp32 parameters.

    Only the new ones are checked.
    """
    self._amp_lazy_init()
    stash = self._amp_stash
    _update_frozen(stash)
    if keeps_half_grads(self):
        post_half_grads(self, scaler)
        return
    masters = stash.all_fp32_from_fp16_params
    earlier = take_grads(masters)
    gradients.copy_to_masters(stash.all_fp16_params, masters)
    unscale_and_add(masters, earlier, scaler)
    unscale_and_add(stash.all_fp32_from_fp32_params, stash.earlier_grads, scaler)
    stash.earlier_grads = {}


@torch.no_grad()
def _copy_masters_to_model(self: Any) -> None:
    stash = self._amp_stash
    copy_to_unfrozen(stash.all_fp16_params, stash.all_fp32_from_fp16_params, stash.frozen)


@torch.no_grad()
def _zero_grad(self: Any, zero_grad: Callable[..., Any], set_to_none: bool = False) -> None:
    """Zero the model's gradients, or drop them with `set_to_none`.

    Those of masters are dropped always. So are those of parameters that were frozen since: momentum and weight decay
    would move weights for zeros.
    """
    self._amp_lazy_init()
    stash = self._amp_stash
    _drop_master_grads(self)
    kept = []
    for param in chain(stash.all_fp16_params, stash.all_fp32_from_fp32_params):
        grad = param.grad
        if set_to_none or grad is None or grad.layout != torch.strided or not param.requires_grad:
            param.grad = None
            continue
        if grad.grad_fn is not None:
            grad.detach_()
        else:  # a view cannot be detached in place
            grad.requires_grad_(False)
        kept.append(grad)
    if kept:
        torch._foreach_zero_(kept)


def _load_state_dict(self: Any, load: Callable[..., Any], state_dict: dict[str, Any]) -> None:
    """Load, with the masters made first: state would be rounded to the dtype of a half-precision parameter."""
    self._amp_lazy_init()
    load(state_dict)


# Without masters.


def _list_params(self: Any, *new_group: Any) -> None:
    """List the parameters of all groups by dtype."""
    stash = self._amp_stash
    stash.lazy_init_called = True
    params = list(dict.fromkeys(chain.from_iterable(group["params"] for group in self.param_groups)))
    stash.all_fp16_params = [p for p in params if p.dtype in HALF_DTYPES]
    stash.all_fp32_params = [p for p in params if p.dtype not in HALF_DTYPES]


@torch.no_grad()
def _prepare_without_masters(self: Any) -> None:
    """Set the earlier gradients aside, so that the backward pass to come makes new ones at the loss scale."""
    self._amp_lazy_init()
    stash = self._amp_stash
    stash.earlier_grads = take_grads(stash.all_fp16_params + stash.all_fp32_params)


@torch.no_grad()
def _post_without_masters(self: Any, scaler: LossScaler) -> None:
    """Unscale the new gradients and add the earlier ones. Only the new ones are checked."""
    self._amp_lazy_init()
    stash = self._amp_stash
    unscale_and_add(stash.all_fp16_params + stash.all_fp32_params, stash.earlier_grads, scaler)
    stash.earlier_grads = {}


def _do_nothing(self: Any) -> None:
    """Stand where an optimizer with masters copies them to the model."""


# Both.


def _add_param_group(self: Any, add: Callable[..., Any], new_group: dict[str, Any]) -> None:
    self._amp_lazy_init()
    add(new_group)
    self._amp_adopt_group(self.param_groups[-1])


def restore_grads(optimizer: Any) -> None:
    """Undo what `_prepare_amp_backward` did: the body of `scale_loss` raised."""
    stash = optimizer._amp_stash
    params = (*stash.all_fp16_params, *stash.all_fp32_params, *stash.all_fp32_from_fp32_params)
    put_grads_back(params, stash.earlier_grads)
    stash.earlier_grads = {}


_WITH_MASTERS: dict[str, Callable[..., Any]] = {
    "_amp_lazy_init": _make_masters,
    "_lazy_init_maybe_master_weights": _make_masters,
    "_amp_adopt_group": _adopt,
    "_prepare_amp_backward": _prepare_with_masters,
    "_post_amp_backward": _post_with_masters,
    "_master_params_to_model_params": _copy_masters_to_model,
}
_WITHOUT_MASTERS: dict[str, Callable[..., Any]] = {
    "_amp_lazy_init": _list_params,
    "_lazy_init_maybe_master_weights": _list_params,
    "_amp_adopt_group": _list_params,
    "_prepare_amp_backward": _prepare_without_masters,
    "_post_amp_backward": _post_without_masters,
    "_master_params_to_model_params": _do_nothing,
}
