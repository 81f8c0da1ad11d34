"""Holds `FP16_Optimizer`: fp32 master weights and a loss scale around any torch optimizer."""

from collections.abc import Callable
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from apex_compat.fp16_utils import fused, gradients, optimizer_state
from apex_compat.fp16_utils.checks import (
    checked_loss,
    checked_max_norm,
    checked_norm_type,
    checked_optimizer,
    checked_scale,
)
from apex_compat.fp16_utils.closures import Attempt, ScaledClosure, SkippedStep
from apex_compat.fp16_utils.masters import Masters
from apex_compat.fp16_utils.policy import new_policy
from apex_compat.fp16_utils.wrapper import OptimizerWrapper


class _Stage(Enum):
    IDLE = auto()  # no gradients to apply
    DEFERRED = auto()  # the model has gradients that the masters have not
    UPDATED = auto()


class FP16_Optimizer(OptimizerWrapper):  # noqa: N801  the name that apex.fp16_utils gave it
    """Trains float16, bfloat16 and float32 parameters with fp32 master weights and a loss scale.

    A master replaces each half-precision parameter in the wrapped optimizer's groups. It is a detached fp32
    copy, and the optimizer updates it. An fp32 parameter is its own master. One step is

        optimizer.zero_grad()
        loss = model(input)
        optimizer.backward(loss)                  # instead of loss.backward()
        optimizer.clip_master_grads(max_norm)     # optional
        optimizer.step()

    which runs this algorithm:

    1. `backward` multiplies the loss by the loss scale, in fp32, and backpropagates.
    2. `update_master_grads` copies the half gradients to the masters, multiplies all gradients by 1 / scale
       and looks for inf and nan. Then the loss scale reacts (see `apex_compat.fp16_utils.policy`): from here on
       `loss_scale` is the scale of the next `backward`. `backward` calls this method unless told not to.
    3. `clip_master_grads` scales the true gradients down to `max_norm`.
    4. `step` updates the masters and copies them to the model, unless `overflow`. A skipped step changes no
       weight and no optimizer state, and returns None.

    Only `step` waits for the device: it reads one value to know whether to skip. A fused optimizer
    (`fused=True`) skips on the device, and then `step` does not wait either.

    `state_dict` has the keys "loss_scaler" (a dict of numbers), "dynamic_loss_scale", "overflow",
    "first_closure_call_this_step", "optimizer_state_dict" and "fp32_from_fp16". The last is a list of fp32
    tensors for each group, which are the masters themselves. `load_state_dict` restores the masters, and makes
    the model's half-precision weights from them; call it after the model's `load_state_dict`. The kind of the
    loss scale and its policy come from the state too.

    Args:
        init_optimizer: a torch optimizer over float16, bfloat16 or float32 parameters. Its per-parameter
            state, if any, moves to the masters in fp32. Schedulers and hooks may be attached to it or to this
            object.
        static_loss_scale: from 2**-100 to 2**127. A power of two scales without rounding.
        dynamic_loss_scale: True lets the scale follow the overflows; `static_loss_scale` is then ignored.
        dynamic_loss_args: a dict of `init_scale` (2**16), `scale_factor` (2), `scale_window` (2000 updates),
            `min_loss_scale` (None: 2**-100), `max_loss_scale` (2**24).
        verbose: print a line for each skipped step. A fused optimizer's skip is printed when `overflow` is read.
        check_overflow: False applies every step unchecked under a static scale, inf and nan included, as
            apex.fp16_utils did.

    Attributes:
        optimizer: the wrapped optimizer. Its groups hold the masters.
        first_closure_call_this_step: bool; False while the closure of `step` runs.

    Raises:
        TypeError: an argument has the wrong type, or a parameter is not float16, bfloat16 or float32.
        ValueError: an argument is out of range, or the optimizer has no parameters.
    """

    def __init__(
        self,
        init_optimizer: Optimizer,
        static_loss_scale: float = 1.0,
        dynamic_loss_scale: bool = False,
        dynamic_loss_args: dict[str, Any] | None = None,
        verbose: bool = True,
        check_overflow: bool = True,
    ) -> None:
        device = checked_optimizer(init_optimizer)
        if dynamic_loss_scale and not check_overflow:
            raise ValueError("check_overflow is False; a dynamic loss scale needs it to be True")
        self._policy = new_policy(dynamic_loss_scale, static_loss_scale, dynamic_loss_args, device)
        super().__init__(init_optimizer)
        self.verbose = verbose
        self.check_overflow = check_overflow
        self.first_closure_call_this_step = True
        self._found_inf = torch.zeros((), dtype=torch.float32, device=device)
        self._overflow: bool | None = False  # what the host knows of found_inf; None: not fetched yet
        self._unreported = False
        self._stage = _Stage.IDLE
        self._masters = Masters(init_optimizer, device)

    @property
    def dynamic_loss_scale(self) -> bool:
        """Return True if the loss scale follows the overflows."""
        return self._policy.dynamic

    @property
    def loss_scale(self) -> float:
        """Return the factor of the next `backward`. This waits for the device; `loss_scale_tensor` does not."""
        return float(self._policy.scale.item())

    @loss_scale.setter
    def loss_scale(self, value: float) -> None:
        self._policy.set(checked_scale("loss_scale", value))

    @property
    def loss_scale_tensor(self) -> Tensor:
        """Return the factor of the next `backward`: float32, shape (), on the device.

        An update replaces this tensor. It never changes.
        """
        return self._policy.scale

    @property
    def found_inf(self) -> Tensor:
        """Return `overflow` as 0. or 1. without waiting: float32, shape (), on the device.

        An update or a clipping replaces this tensor. It never changes.
        """
        return self._found_inf

    @property
    def overflow(self) -> bool:
        """Return True if a gradient is inf or nan, or if clipping found no finite norm. This may wait."""
        if self._overflow is None:
            self._overflow = bool(self._found_inf.item())
        if self._unreported:
            self._unreported = False
            if self._overflow:
                self._report_skip()
        return self._overflow

    def zero_grad(  # type: ignore[override]  # torch's first argument has another name
        self,
        set_grads_to_None: bool = False,  # noqa: N803  apex's name
        set_to_none: bool | None = None,
    ) -> None:
        """Zero the gradients of model and masters, or drop them.

        Args:
            set_grads_to_None: True drops the gradients, which saves a pass and their memory.
            set_to_none: torch's name for the same argument. It wins when given.
        """
        drop = set_grads_to_None if set_to_none is None else set_to_none
        self.optimizer.zero_grad(set_to_none=drop)
        self._masters.zero_model_grads(drop)
        self._stage = _Stage.IDLE

    def backward(self, loss: Tensor, update_master_grads: bool = True, retain_graph: bool = False) -> None:
        """Backpropagate `loss` times the loss scale. Gradients add up in the model as with `loss.backward()`.

        Args:
            loss: floating point, one element, requires grad. It is cast to float32 before it is scaled.
            update_master_grads: False leaves the call of `update_master_grads` to the caller. Several losses
                can then be backpropagated at the cost of one update.
            retain_graph: as in torch.Tensor.backward.

        Raises:
            TypeError: `loss` is not a tensor.
            ValueError: `loss` is not one floating point number that requires grad.
        """
        checked_loss(loss)
        self._masters.bring_grads_to(self._policy.scale)
        self._stage = _Stage.DEFERRED
        # In float32: the product of a float16 loss and the scale would overflow.
        scaled = loss.float() * self._policy.scale.to(loss.device, non_blocking=True)
        torch.autograd.backward(scaled, retain_graph=retain_graph)
        if update_master_grads:
            self.update_master_grads()

    @torch.no_grad()
    def update_master_grads(self) -> None:
        """Make the masters' gradients from the model's, unscale them, look for overflow, update the loss scale.

        A parameter without a gradient leaves its master without one.
        """
        self._found_inf = self._masters.update_grads(self._policy.scale, self.check_overflow)
        self._overflow = None if self.check_overflow else False
        self._unreported = False
        self._attempted_scale = self._policy.scale
        self._policy.update(self._found_inf)
        self._stage = _Stage.UPDATED

    @torch.no_grad()
    def clip_master_grads(self, max_norm: float, norm_type: float = 2) -> Tensor:
        """Scale the masters' gradients down to a total norm of `max_norm`, as torch's clip_grad_norm_ does.

        Args:
            max_norm: at least 0; inf clips nothing.
            norm_type: above 0; inf is the largest magnitude.

        Returns:
            The norm before clipping: float32, shape (), on the device. It is -1 after an overflow. It is also -1
            where finite gradients are too large for their norm to be finite. In both cases the gradients stay as
            they are and `step` skips, unless check_overflow=False. In the latter case the loss scale does not
            react, since it had no part in it.

        Raises:
            RuntimeError: no gradients wait to be applied.
            TypeError, ValueError: an argument is not such a number.
        """
        self._require_updated("clip_master_grads()")
        max_norm, norm_type = checked_max_norm(max_norm), checked_norm_type(norm_type)
        grads = self._masters.all_grads()
        norm = gradients.total_norm(grads, norm_type, self._found_inf.device)
        if self.check_overflow:  # clipped by an infinite norm they would be zeros, for which AdamW moves the weights
            self._found_inf, self._overflow = torch.maximum(self._found_inf, (~norm.isfinite()).float()), None
        gradients.clip_(grads, max_norm, norm, self._found_inf)
        return norm.masked_fill(self._found_inf.bool(), -1.0)

    def inspect_master_grad_data(self) -> list[list[Tensor | None]] | None:
        """Return the masters' gradients, group by group, or None after an overflow.

        The gradients are unscaled, and None for a parameter without one. Changing them changes the next step.

        Raises:
            RuntimeError: `update_master_grads` was not called after `backward`.
        """
        if self._stage is _Stage.DEFERRED:
            self._require_updated("inspect_master_grad_data()")
        if self.overflow:
            return None
        return [[None if p.grad is None else p.grad.detach() for p in g["params"]] for g in self.param_groups]

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the masters and copy them to the model, unless `overflow`.

        Args:
            closure: for optimizers such as LBFGS. It calls `zero_grad()`, computes the loss, calls
                `backward(loss)` of this object and returns the loss. A call that overflows under a dynamic
                scale is repeated with the reduced one.

        Returns:
            The return value of the wrapped optimizer's step, or None for a skipped step.

        Raises:
            RuntimeError: `backward` and `update_master_grads` were not called since the last step; or the
                closure still overflows after 128 repeats, or after its first call at a scale that does not fall.
        """
        if closure is not None:
            return self._step_with_closure(closure)
        self._require_updated("step()")
        self._stage = _Stage.IDLE
        if self._overflow is None and fused.skips_on_device(self.optimizer):
            result = fused.step(self.optimizer, self._found_inf)
            self._unreported = True
        elif self.overflow:
            self._report_skip()
            return None
        else:
            result = self.optimizer.step()
        self._masters.copy_to_model()
        return result

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as to any torch optimizer. Its half-precision parameters get masters.

        Raises:
            TypeError: a parameter is not float16, bfloat16 or float32.
            ValueError: a parameter is in another group already.
        """
        group = self._masters.checked_group(param_group)
        self.optimizer.add_param_group(group)
        self._masters.adopt(group)

    def _get_state(self) -> dict[str, Any]:
        return {
            "loss_scaler": self._policy.state_dict(),
            "dynamic_loss_scale": self.dynamic_loss_scale,
            "overflow": self.overflow,
            "first_closure_call_this_step": self.first_closure_call_this_step,
            "optimizer_state_dict": self.optimizer.state_dict(),
            "fp32_from_fp16": self._masters.by_group(),
        }

    def _set_state(self, state: dict[str, Any]) -> None:
        device = self._found_inf.device
        masters = (self._masters.by_group(), self._masters.trainable_by_group())
        policy, targets = optimizer_state.checked(state, self.optimizer, masters, device)
        if policy.dynamic and not self.check_overflow:
            raise ValueError("state_dict has a dynamic loss scale; check_overflow is False and must be True")
        self.optimizer.load_state_dict(state["optimizer_state_dict"])
        self._masters.load(targets, state["fp32_from_fp16"])
        self._policy = policy
        self._overflow = state["overflow"]
        self._found_inf = torch.full_like(self._found_inf, float(state["overflow"]))
        self._unreported, self._stage = False, _Stage.IDLE
        self.first_closure_call_this_step = state["first_closure_call_this_step"]

    def _require_updated(self, method: str) -> None:
        """Raise RuntimeError, naming `method`, unless the gradients of a `backward` wait to be applied."""
        if self._stage is not _Stage.UPDATED:
            raise RuntimeError(
                f"{method} was called before backward(): call backward(loss) first, and "
                "update_master_grads() as well if backward had update_master_grads=False"
            )

    def _report_skip(self) -> None:
        # Without this a scheduler of the wrapped optimizer takes the skip for calls in the wrong order.
        self.optimizer._opt_called = True  # type: ignore[attr-defined]
        if self.verbose:
            before, after = self._attempted_scale.item(), self.loss_scale
            same = f"stays at {after:g}" if after == before else f"is {after:g} from here on"
            change = f"reduced from {before:g} to {after:g}" if after < before else same
            print(f"Gradient overflow: step skipped, loss scale {change}")

    def _step_with_closure(self, closure: Callable[[], Any]) -> Any:
        def attempt() -> Attempt:
            self.first_closure_call_this_step = False
            scale = self._policy.scale
            loss = closure()
            self._require_updated("step(closure)")
            return Attempt(loss, self.overflow, scale, self._policy.scale)

        self.first_closure_call_this_step = True
        try:
            result = self.optimizer.step(ScaledClosure(attempt, self._masters.copy_to_model))
        except SkippedStep:
            self._report_skip()
            return None
        finally:
            self.first_closure_call_this_step = True
            self._stage = _Stage.IDLE
        self._masters.copy_to_model()
        return result
