"""The seam between training and precision management, and its three implementations side by side.

All three scale the loss in fp32, clip true (unscaled) gradients, and skip a step whose gradients are not
finite. They differ in where the half-precision copies live and in who keeps the loss scale.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim import Optimizer

from apex_compat.fp16_utils import (
    LARGEST_SCALE,
    SMALLEST_SCALE,
    FP16_Optimizer,
    fused,
    master_params_to_model_params,
    model_grads_to_master_grads,
)

INITIAL_SCALE = 2.0**16
"""Where the loss scale of the GradScaler that `Autocast` makes starts."""


class StepResult(NamedTuple):
    """The outcome of one optimizer step: tensors of shape () on the model's device, so that nothing waits for it."""

    applied: Tensor
    """bool; False: a gradient was inf or nan (or too large for its norm to be finite), and no weight changed"""
    grad_norm: Tensor
    """fp32; L2 norm of the unscaled gradients before clipping; inf where `applied` is False

    That is so in every mode, and where a gradient is nan too: FP16_Optimizer says no more than that there was an
    overflow, and nan is what a record says of a norm that is not known.
    """
    loss_scale: Tensor
    """fp32; the factor that this step's loss was multiplied by"""


class Precision(Protocol):
    """Owns dtypes, loss scale and master weights; knows no model architecture and no data.

    The caller clears the model's gradients, then calls `forward`, `backward` (again, to accumulate) and `step`.
    """

    @property
    def optimizer(self) -> Optimizer:
        """Return what a learning rate scheduler of torch takes; `step` is what steps it.

        A skipped step counts as one of the optimizer, so that no scheduler warns of it.
        """

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups; the training loop anneals their "lr"."""

    def forward(self) -> AbstractContextManager[Any]:
        """Return the context for model and loss, in training and in evaluation."""

    def backward(self, loss: Tensor) -> None:
        """Backpropagate `loss` (fp32, shape ()) times the loss scale."""

    def step(self, max_norm: float) -> StepResult:
        """Take one optimizer step.

        Unscale, check finite, clip to `max_norm`, update the fp32 weights, copy them to the model, update the
        scale - in that order. On overflow change the scale and nothing else.
        """

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain values only, so that it loads with weights_only=True."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore; call after model.load_state_dict, since the masters win over the half weights."""


@final
class MasterWeights:
    """fp32 master weights and a static loss scale S, kept by hand.

    1. Model and loss run in the dtype of the model's weights.
    2. The loss, in fp32, is multiplied by S; so is every gradient then, and fewer of them round to 0 in fp16.
    3. Gradients are copied to the fp32 masters and multiplied by 1/S.
    4. Their norm is taken. Where it is not finite the step ends here: nothing has changed.
    5. They are clipped, and the optimizer updates the masters.
    6. The masters are rounded into the model's weights.

    An fp32 model is its own master: steps 3 (but for 1/S) and 6 fall away.

    Args:
        params: the model's parameters.
        optimizer: over the masters of `params`, in the same order, or over `params` themselves, in any order.
        loss_scale: S, above 0. A power of two makes steps 2 and 3 exact.

    Attributes:
        optimizer: that of the arguments.
    """

    def __init__(self, params: Iterable[nn.Parameter], optimizer: Optimizer, loss_scale: float = 1.0) -> None:
        self._params = list(params)
        self._masters: list[nn.Parameter] = _parameters(optimizer)
        self._has_copies = set(self._params) != set(self._masters)
        self.optimizer = optimizer
        self._set_loss_scale(loss_scale)

    def _set_loss_scale(self, loss_scale: float) -> None:
        self._scaled = loss_scale != 1.0
        scale, device = torch.tensor(loss_scale, dtype=torch.float32), self._masters[0].device
        inverse = scale.double().reciprocal().float()  # as GradScaler rounds it; on the CPU, since MPS has no float64
        self._loss_scale, self._inverse_scale = scale.to(device), inverse.to(device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups."""
        return self.optimizer.param_groups

    def forward(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: the weights' dtype decides."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Precision.backward`."""
        (loss.float() * self._loss_scale).backward()  # type: ignore[no-untyped-call]

    def step(self, max_norm: float) -> StepResult:
        """See `Precision.step`."""
        if self._has_copies:
            model_grads_to_master_grads(self._params, self._masters)
        if self._scaled:
            torch._foreach_mul_([m.grad for m in self._masters if m.grad is not None], self._inverse_scale)
        norm, found_inf = clip_if_finite(self._masters, max_norm)
        _step_unless(found_inf, self.optimizer)
        if self._has_copies:
            master_params_to_model_params(self._params, self._masters)
        return StepResult(~found_inf, norm, self._loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return `optimizer`, `loss_scale`, and `masters` (not copied) in the order of the optimizer's groups."""
        return {
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": self._loss_scale.item(),
            "masters": [m.detach() for m in self._masters],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Precision.load_state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._set_loss_scale(state["loss_scale"])
        with torch.no_grad():
            for master, saved in zip(self._masters, state["masters"], strict=True):
                master.copy_(saved)
        if self._has_copies:
            master_params_to_model_params(self._params, self._masters)


@final
class WrappedOptimizer:
    """Everything left to FP16_Optimizer; its loss scale S is static or dynamic.

    1. Model and loss run in the dtype of the model's weights.
    2. `FP16_Optimizer.backward` multiplies the loss by S in fp32.
    3. `update_master_grads` copies the gradients to the fp32 masters, multiplies them by 1/S, checks them, and
       updates S: in dynamic mode halved after an overflow, doubled after a window without one.
    4. `clip_master_grads` takes the norm and clips.
    5. `step` updates the masters and rounds them into the model's weights, or does nothing after an overflow.

    Args:
        optimizer: this project's FP16_Optimizer, or that of an old apex, over the model's parameters.

    Attributes:
        optimizer: that of the arguments. apex's is no torch optimizer, so with it this is the one that it wraps.
    """

    def __init__(self, optimizer: Any) -> None:
        self._wrapper = optimizer
        self.optimizer: Optimizer = optimizer if isinstance(optimizer, Optimizer) else optimizer.optimizer
        self._device = _parameters(optimizer)[0].device
        self._loss_scale = self._current_scale()

    def _current_scale(self) -> Tensor:
        if isinstance(self._wrapper, FP16_Optimizer):
            return self._wrapper.loss_scale_tensor
        return torch.tensor(self._wrapper.loss_scale, dtype=torch.float32, device=self._device)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the wrapped optimizer's groups."""
        return self.optimizer.param_groups

    def forward(self) -> AbstractContextManager[Any]:
        """Return a context that does nothing: the weights' dtype decides."""
        return nullcontext()

    def backward(self, loss: Tensor) -> None:
        """See `Precision.backward`."""
        self._loss_scale = self._current_scale()  # update_master_grads moves it on before the step is reported
        self._wrapper.backward(loss, update_master_grads=False)

    def step(self, max_norm: float) -> StepResult:
        """See `Precision.step`."""
        self._wrapper.update_master_grads()
        # In apex finite gradients whose norm is inf are clipped to 0 by a finite max_norm, and to nan by inf.
        max_norm = min(max_norm, torch.finfo(torch.float32).max)
        norm = torch.as_tensor(self._wrapper.clip_master_grads(max_norm), dtype=torch.float32, device=self._device)
        applied = norm.isfinite() & (norm >= 0)  # clip_master_grads says -1 on overflow
        self._wrapper.step()
        _count_step(self.optimizer)
        return StepResult(applied, torch.where(applied, norm, torch.inf), self._loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of the FP16_Optimizer, which holds the masters; apex's scaler object as its plain values."""
        state: dict[str, Any] = self._wrapper.state_dict()
        scaler = state["loss_scaler"]
        return state if isinstance(scaler, dict) else state | {"loss_scaler": dict(vars(scaler))}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Precision.load_state_dict`."""
        if not isinstance(self._wrapper, FP16_Optimizer):
            vars(scaler := self._wrapper.loss_scaler).update(state["loss_scaler"])
            state = state | {"loss_scaler": scaler}
        self._wrapper.load_state_dict(state)


@final
class Autocast:
    """fp32 weights, half arithmetic where torch.autocast finds it safe, torch.amp.GradScaler for the loss scale S.

    1. Model and loss run under autocast: products in `dtype`, what needs range (softmax, loss, sums) in fp32.
    2. `GradScaler.scale` multiplies the loss by S. Parameter gradients come out in fp32, like the weights.
    3. `GradScaler.unscale_` multiplies them by 1/S and checks them.
    4. Their norm is taken, and they are clipped.
    5. `GradScaler.step` updates the weights, unless a gradient was not finite.
    6. `GradScaler.update` halves S after a skipped step and doubles it after a window without one, within
       [2**-100, 2**127], since GradScaler alone would take it to 0 and never back; a static scale stays.

    bfloat16 and float32 need no loss scale. They run at a static scale of 1, for the check of step 3.

        Autocast(torch.optim.AdamW(model.parameters()), dtype=torch.bfloat16)

    Args:
        optimizer: over the model's fp32 parameters.
        scaler: enabled, for the same device. By default one is made: with float16 its scale starts at 2**16.
        device: "cpu", "cuda" or another that autocast knows; by default that of the parameters.
        dtype: torch.float16, torch.bfloat16, or torch.float32 for no autocast.
        static_scale: the scaler's initial scale, kept for the whole run; None leaves it dynamic, but where `scaler` is
            made for bfloat16 or float32.

    Attributes:
        optimizer: that of the arguments.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        scaler: torch.amp.GradScaler | None = None,
        device: str | torch.device | None = None,
        dtype: torch.dtype = torch.float16,
        static_scale: float | None = None,
    ) -> None:
        self._params = _parameters(optimizer)
        self.optimizer = optimizer
        self._device_type = torch.device(device or self._params[0].device).type
        if scaler is None:
            static_scale = 1.0 if static_scale is None and dtype is not torch.float16 else static_scale
            scaler = torch.amp.GradScaler(self._device_type, init_scale=static_scale or INITIAL_SCALE)
        self._scaler = scaler
        self._dtype = dtype
        self._static_scale = static_scale
        self._one = torch.ones((), device=self._params[0].device)
        self._loss_scale = scaler.scale(self._one)  # a new tensor, which update() leaves alone; get_scale() waits

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups."""
        return self.optimizer.param_groups

    def forward(self) -> AbstractContextManager[Any]:
        """Return torch.autocast; for float32, disabled."""
        return torch.autocast(self._device_type, self._dtype, enabled=self._dtype is not torch.float32)

    def backward(self, loss: Tensor) -> None:
        """See `Precision.backward`."""
        self._loss_scale = self._scaler.scale(self._one)
        self._scaler.scale(loss.float()).backward()  # type: ignore[no-untyped-call]

    def step(self, max_norm: float) -> StepResult:
        """See `Precision.step`."""
        self._scaler.unscale_(self.optimizer)
        norm, found_inf = clip_if_finite(self._params, max_norm)
        for flag in self._scaler._found_inf_per_device(self.optimizer).values():
            # GradScaler tests before it multiplies by 1/S: with S < 1 the product can still become inf.
            torch.maximum(flag, found_inf.float(), out=flag)
        with fused.momentum_starts_at_zero(self.optimizer, found_inf):
            self._scaler.step(self.optimizer)
        _count_step(self.optimizer)
        self._scaler.update(self._static_scale)
        if self._static_scale is None:
            self._scaler.update(self._scaler.scale(self._one).clamp_(SMALLEST_SCALE, LARGEST_SCALE))
        return StepResult(~found_inf, norm, self._loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return `optimizer` and `scaler`; the fp32 weights are the model's own."""
        return {"optimizer": self.optimizer.state_dict(), "scaler": self._scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Precision.load_state_dict`."""
        self.optimizer.load_state_dict(state["optimizer"])
        self._scaler.load_state_dict(state["scaler"])


def _parameters(optimizer: Optimizer) -> list[nn.Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def clip_if_finite(params: list[nn.Parameter], max_norm: float) -> tuple[Tensor, Tensor]:
    """Clip the gradients as `clip_grad_norm_` does; return their norm (fp32) and whether it is not finite (bool).

    A norm that is nan is returned as inf. Non-finite gradients stay as they are, to be seen; clipping by a nan norm
    would make all of them nan.
    """
    norm = get_total_norm([p.grad for p in params if p.grad is not None])
    found_inf = ~norm.isfinite()
    clip_grads_with_norm_(params, max_norm, norm.masked_fill(found_inf, 0.0))
    return norm.masked_fill(found_inf, torch.inf), found_inf


def _step_unless(found_inf: Tensor, optimizer: Optimizer) -> None:
    """Let `optimizer` step unless `found_inf` (bool, shape ()); one that is not fused costs a wait for the device."""
    if fused.skips_on_device(optimizer):
        fused.step(optimizer, found_inf.float())
    elif not found_inf.item():
        optimizer.step()
    _count_step(optimizer)


def _count_step(optimizer: Optimizer) -> None:
    """Let a scheduler know of a step that was skipped. It would warn of a loop that forgot `optimizer.step()`.

    torch has no call for this. A scheduler sets the flag where it sees `optimizer.step()`.
    """
    optimizer._opt_called = True  # type: ignore[attr-defined]
