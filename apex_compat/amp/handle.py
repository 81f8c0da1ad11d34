"""Holds `scale_loss`, and the handles of O1 and of the old interface `amp.init`."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from apex_compat.amp._amp_state import _amp_state
from apex_compat.amp._process_optimizer import mark_overflow, restore_grads
from apex_compat.amp.opt import OptimWrapper
from apex_compat.amp.scaler import LossScaler
from apex_compat.amp.utils import casts, casts_disabled


@contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: Any,
    loss_id: int = 0,
    model: Any = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Tensor]:
    """Give the loss times its loss scale, to be backpropagated within this context.

        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()

    1. At the start the gradients that the optimizers' parameters have are set aside.
    2. At the end the new gradients are unscaled, checked for inf and nan, and added to the earlier ones. Under O2
       this happens in fp32, in the masters.
    3. Then the loss scale reacts. After an overflow the next step of each of `optimizers` is skipped.

    Without masters and with a static loss scale of 1.0 there is nothing to do.

    Args:
        loss: floating point. It is cast to float32 before it is scaled, since the product could leave float16.
        optimizers: the optimizer, or a list or tuple of those, for whose parameters the gradients are.
        loss_id: which of the `num_losses` loss scales to use.
        model: ignored, as in apex.
        delay_unscale: True leaves scaled gradients, to which further ones are added. It spares the work of 2 and 3
            for all micro-batches of a step but the last.
        delay_overflow_check: True leaves out step 3. The caller calls `update_scale` of the loss scaler.

    Raises:
        RuntimeError: `amp.initialize` was not called, or not with these optimizers or that many losses.
    """
    if not hasattr(_amp_state, "opt_properties"):
        raise RuntimeError(
            "Invoked amp.scale_loss, but internal Amp state has not been initialized: "
            "call model, optimizer = amp.initialize(model, optimizer, opt_level=...) first"
        )
    if not _amp_state.opt_properties.enabled:
        yield loss
        return
    listed = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    scaler = _scaler(loss_id)
    _check_initialized(listed)
    try:
        if _needs_nothing(scaler):
            yield loss.float()
            return
        yield from _scaled(loss, listed, loss_id, delay_unscale, delay_overflow_check)
    finally:
        # The weights change next. And a cast outlives the graph that its gradient needs.
        casts.cache.clear()


def _scaler(loss_id: int) -> LossScaler:
    scalers: list[LossScaler] = _amp_state.loss_scalers
    if not 0 <= loss_id < len(scalers):
        raise RuntimeError(
            f"loss_id is {loss_id}; amp.initialize had num_losses={len(scalers)}, which allows 0 to {len(scalers) - 1}"
        )
    return scalers[loss_id]


def _check_initialized(optimizers: list[Any]) -> None:
    for optimizer in optimizers:
        if not hasattr(optimizer, "_amp_stash"):
            raise RuntimeError(
                f"amp.scale_loss got a {type(optimizer).__name__} that was not passed to amp.initialize: "
                "pass it there, and here what initialize returned"
            )


def _needs_nothing(scaler: LossScaler) -> bool:
    properties = _amp_state.opt_properties
    unscaled = not scaler.dynamic and scaler.loss_scale() == 1.0
    return unscaled and not properties.master_weights and not scaler.check_overflow


def _scaled(
    loss: Tensor, optimizers: list[Any], loss_id: int, delay_unscale: bool, delay_overflow_check: bool
) -> Iterator[Tensor]:
    scaler = _scaler(loss_id)
    prepared = [] if delay_unscale else [o for o in optimizers if not o._amp_stash.params_have_scaled_gradients]
    for optimizer in prepared:
        optimizer._prepare_amp_backward()
    try:
        yield loss.float() * scaler.loss_scale()
    except BaseException:
        for optimizer in prepared:
            restore_grads(optimizer)
        raise
    if delay_unscale:
        for optimizer in optimizers:
            optimizer._amp_stash.params_have_scaled_gradients = True
        return
    scaler.clear_overflow_state()
    for optimizer in optimizers:
        optimizer._post_amp_backward(scaler)
        optimizer._amp_stash.params_have_scaled_gradients = False
    if not delay_overflow_check and scaler.update_scale():
        for optimizer in optimizers:
            mark_overflow(optimizer, loss_id, scaler)


def disable_casts() -> AbstractContextManager[None]:
    """Return a context in which the functions that O1 patches do not cast. Without O1 it does nothing."""
    return casts_disabled()


class AmpHandle:
    """Switches the casts of O1 on, from its construction until `_deactivate`.

    `amp.initialize` makes one for O1, and `amp.init` for scripts of the old interface.

    Args:
        loss_scale: as for `LossScaler`, for the optimizers of `wrap_optimizer`.
        enable_caching: True casts a weight once for all its uses between two steps.
        verbose: True prints each cast.
        half: the dtype of half precision, float16 or bfloat16.
        device_types: the types of the devices whose tensors are cast. None means the accelerator, or the CPU where
            there is none.
    """

    def __init__(
        self,
        loss_scale: float | str = "dynamic",
        enable_caching: bool = True,
        verbose: bool = False,
        half: torch.dtype = torch.float16,
        device_types: frozenset[str] | None = None,
    ) -> None:
        self.loss_scale = loss_scale
        self._undo: list[Callable[[], None]] = []
        self._patches: list[tuple[Any, str, Any]] = []
        self._half, self._caching, self._verbose = half, enable_caching, verbose
        self._device_types = _accelerator_or_cpu() if device_types is None else device_types
        self._activate()

    def _activate(self) -> None:
        """Switch the casts on, with the functions that earlier calls of `patch` put in place."""
        casts.cache.clear()
        casts.on, casts.handle, casts.half = True, self, self._half
        casts.caching, casts.verbose, casts.device_types = self._caching, self._verbose, self._device_types
        self._call_at_end(_without_fast_path_of_attention())
        self._call_at_end(_without_compiler())
        patches, self._patches = self._patches, []
        for patch in patches:
            self.patch(*patch)

    def is_active(self) -> bool:
        """Return True while the patched functions cast."""
        return casts.handle is self and casts.on

    def patch(self, owner: Any, name: str, function: Any) -> None:
        """Put `function` in the place of the attribute `name` of a module or class, until `_deactivate`."""
        inherited = name not in vars(owner)
        before = getattr(owner, name)

        def undo() -> None:
            if inherited:
                delattr(owner, name)
            else:
                setattr(owner, name, before)

        setattr(owner, name, function)
        self._patches.append((owner, name, function))
        self._call_at_end(undo)

    def _call_at_end(self, undo: Callable[[], None]) -> None:
        self._undo.append(undo)

    def _deactivate(self) -> None:
        """Undo all patches, the last first: a function that was patched twice had its first patch inside.

        `_activate` puts them back.
        """
        while self._undo:
            self._undo.pop()()
        if casts.handle is self:
            casts.on, casts.handle = False, None
            casts.cache.clear()

    def _disable_casts(self) -> AbstractContextManager[None]:
        return casts_disabled()

    def scale_loss(self, loss: Any, optimizer: Any) -> NoReturn:
        """Raise RuntimeError: a handle does not scale losses."""
        raise RuntimeError(
            "The old Amp API is no longer supported: use amp.initialize and amp.scale_loss, "
            "or optimizer = handle.wrap_optimizer(optimizer) and optimizer.scale_loss(loss)"
        )

    def wrap_optimizer(self, optimizer: Any, num_loss: int = 1) -> OptimWrapper:
        """Return `optimizer` in a wrapper with a loss scale for each of `num_loss` losses."""
        return OptimWrapper(optimizer, self, num_loss)

    @property
    def has_cache(self) -> bool:
        """Return True if the casts of weights are kept."""
        return casts.caching

    @property
    def cache(self) -> dict[Tensor, Any]:
        """Return the cast weights, by parameter."""
        return casts.cache

    def remove_cache(self, param: Tensor) -> None:
        """Forget the cast of `param`."""
        casts.cache.pop(param, None)

    def _clear_cache(self) -> None:
        casts.cache.clear()

    @property
    def verbose(self) -> bool:
        """Return True if each cast is printed."""
        return casts.verbose


class NoOpHandle:
    """Stands for an `AmpHandle` where amp is not enabled."""

    has_cache = False
    verbose = False

    def is_active(self) -> bool:
        """Return False."""
        return False

    def _disable_casts(self) -> AbstractContextManager[None]:
        return casts_disabled()

    def wrap_optimizer(self, optimizer: Any, num_loss: int = 1) -> OptimWrapper:
        """Return `optimizer` in a wrapper that does nothing else."""
        return OptimWrapper(optimizer, self, num_loss)

    @contextmanager
    def scale_loss(self, loss: Tensor, optimizer: Any) -> Iterator[Tensor]:
        """Give the loss itself."""
        yield loss

    def _clear_cache(self) -> None:
        """Do nothing."""

    def _deactivate(self) -> None:
        """Do nothing."""


def _accelerator_or_cpu() -> frozenset[str]:
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return frozenset({accelerator.type if accelerator else "cpu"})


def _without_compiler() -> Callable[[], None]:
    """Run functions of torch.compile as plain Python; return the way back.

    A compiled function would depend on the cache of casts, and be compiled again at each step.
    """
    stance: Any = torch.compiler.set_stance("force_eager")
    return lambda: stance.__exit__(None, None, None)


def _without_fast_path_of_attention() -> Callable[[], None]:
    """Switch off the kernels that take whole attention layers, past the patched functions; return the way back."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    return lambda: torch.backends.mha.set_fastpath_enabled(before)
