"""Holds the optimizer of the old interface: `amp.init().wrap_optimizer(optimizer)`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from apex_compat.amp._amp_state import master_params, maybe_print
from apex_compat.amp._grad_stash import put_grads_back, take_grads, unscale_and_add
from apex_compat.amp.scaler import LossScaler
from apex_compat.amp.utils import casts_disabled


class OptimWrapper:
    """An optimizer with a loss scale for each of its losses.

        handle = amp.init()
        optimizer = handle.wrap_optimizer(optimizer, num_loss=2)
        # each step, the losses in the same order
        for loss in losses:
            with optimizer.scale_loss(loss) as scaled_loss:
                scaled_loss.backward()
        optimizer.step()

    A step is skipped if a loss since the last one overflowed. What is not defined here is the optimizer's own.

    Args:
        optimizer: a torch optimizer.
        amp_handle: what `amp.init` returned. Where it is not active, nothing is scaled.
        num_loss: the number of losses in a step.
    """

    def __init__(self, optimizer: Any, amp_handle: Any, num_loss: int) -> None:
        self._optimizer = optimizer
        self._amp_handle = amp_handle
        self._num_loss = num_loss
        self._loss_idx = 0
        self._skip_next = [False] * num_loss
        self._loss_scaler = [LossScaler(getattr(amp_handle, "loss_scale", 1.0)) for _ in range(num_loss)]

    @contextmanager
    def scale_loss(self, loss: Tensor) -> Iterator[Tensor]:
        """Give the loss times the scale of the next of the losses, to be backpropagated within this context.

        Raises:
            RuntimeError: the step had all its losses.
        """
        if not self._amp_handle.is_active():
            yield loss
            return
        if self._loss_idx == self._num_loss:
            raise RuntimeError(f"scale_loss was called more than num_loss={self._num_loss} times before step()")
        scaler = self._loss_scaler[self._loss_idx]
        params = list(master_params(self._optimizer))
        earlier = take_grads(params)  # of the losses before: unscaled already
        try:
            yield loss.float() * scaler.loss_scale()
        except BaseException:
            put_grads_back(params, earlier)
            raise
        scaler.clear_overflow_state()
        unscale_and_add(params, earlier, scaler)
        self._skip_next[self._loss_idx] = scaler.update_scale()
        self._loss_idx += 1

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step, unless one of the losses overflowed.

        Raises:
            NotImplementedError: a closure is given while the casts are active.
        """
        if not self._amp_handle.is_active():
            return self._optimizer.step(closure)
        if closure is not None:
            raise NotImplementedError("amp does not support closures: call backward in scale_loss, then step()")
        self._loss_idx = 0
        self._amp_handle._clear_cache()
        if any(self._skip_next):
            self._skip_next = [False] * self._num_loss
            scales = ", ".join(str(scaler.loss_scale()) for scaler in self._loss_scaler)
            maybe_print(f"Gradient overflow.  Skipping step, loss scale is {scales}")
            return None
        with casts_disabled():
            return self._optimizer.step()

    @property
    def loss_scale(self) -> float:
        """Return the scale of the next of the losses."""
        return self._loss_scaler[self._loss_idx % self._num_loss].loss_scale()

    def __getattr__(self, name: str) -> Any:
        if name == "_optimizer":  # in a copy that is not filled yet
            raise AttributeError(name)
        return getattr(self._optimizer, name)

    def __repr__(self) -> str:
        return repr(self._optimizer)
