"""The seam over `apex_compat.amp`: what a script of apex did, beside what one of torch.amp does."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apex_compat import amp
from apex_compat.amp._amp_state import AmpState, _amp_state
from apex_compat.amp._process_optimizer import mark_overflow
from apex_compat.amp.scaler import LossScaler
from apex_compat.amp.utils import Casts, casts
from roundoff.precision import INITIAL_SCALE, StepResult, clip_if_finite

LARGEST_DYNAMIC_SCALE = 2.0**24
"""The default max_loss_scale of `amp.initialize`."""


@final
class AmpPrecision:
    """Everything left to apex's amp, at its opt level O1 or O2.

    1. `amp.initialize` prepares the model and the optimizer. O1: the weights stay fp32, and torch's functions cast
       their arguments, products to `dtype`, what needs range or digits to fp32. O2: the weights become `dtype`, but
       for batch norms, and the optimizer gets fp32 masters.
    2. `amp.scale_loss` multiplies the loss by the loss scale S in fp32. Gradients stay scaled until the step
       (delay_unscale=True), so that several backward passes add up in the dtype of the weights.
    3. A last `amp.scale_loss` multiplies the gradients by 1/S and checks them; O2: in the masters, in fp32.
    4. The norm of `amp.master_params` is taken, and they are clipped. A norm that is not finite is an overflow too.
    5. S is halved after an overflow, and doubled after a window of steps without one, up to `max_loss_scale`.
    6. The optimizer steps, or skips after an overflow; O2: the masters are rounded into the model's weights.

    amp keeps its state in the process, and O1 its casts in torch's functions. Both are this object's within
    `forward`, `backward` and `step` alone. Elsewhere torch's functions are torch's own, and other users of amp find
    what is theirs. So several modes can take turns in one process.

    Under O2 the model's own `state_dict` has the masters, as it has after `amp.initialize`.

        AmpPrecision(model, torch.optim.SGD(model.parameters(), lr=0.1), "O2")

    Args:
        model: in fp32. It is changed in place.
        optimizer: over the model's parameters. It is changed in place.
        opt_level: "O1" or "O2".
        dtype: torch.float16, or torch.bfloat16, which apex did not know.
        static_scale: S, kept for the whole run; None leaves it dynamic in float16, and is 1 in bfloat16.
        init_scale: where a dynamic S starts.
        scale_window: the steps in a row without overflow after which a dynamic S is doubled.

    Attributes:
        optimizer: that of the arguments.

    Raises:
        RuntimeError: the model is in half precision or in a parallel wrapper, or the optimizer was given before.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        opt_level: str = "O1",
        dtype: torch.dtype = torch.float16,
        static_scale: float | None = None,
        init_scale: float = INITIAL_SCALE,
        scale_window: int = 2000,
    ) -> None:
        if static_scale is None and dtype is not torch.float16:
            static_scale = 1.0
        self._own = _OwnState()
        self.optimizer = optimizer
        with self._own.in_place():
            amp.initialize(
                model,
                optimizer,
                opt_level=opt_level,
                # O1 takes no other dtype than that of its weights, or bfloat16 for its casts.
                cast_model_type=None if dtype is torch.float16 else dtype,
                loss_scale="dynamic" if static_scale is None else static_scale,
                verbosity=0,
                check_overflow=True,
            )
            if static_scale is None:
                largest = max(init_scale, LARGEST_DYNAMIC_SCALE)
                _amp_state.loss_scalers = [
                    LossScaler("dynamic", init_scale, scale_window=scale_window, max_loss_scale=largest)
                ]
            optimizer._lazy_init_maybe_master_weights()  # type: ignore[attr-defined]  # so the groups have the masters
        self._masters: list[Any] = list(amp.master_params(optimizer))
        self._zero = torch.zeros((), device=self._masters[0].device)
        self._loss_scale = self._zero  # until there is a loss

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the optimizer's groups, whose parameters are `amp.master_params`."""
        return self.optimizer.param_groups

    def forward(self) -> AbstractContextManager[Any]:
        """Return the context in which amp is this object's; with O1 torch's functions cast in it."""
        return self._own.in_place()

    def backward(self, loss: Tensor) -> None:
        """See `Precision.backward`."""
        with self._own.in_place():
            self._loss_scale = torch.full_like(self._zero, _amp_state.loss_scalers[0].loss_scale())
            with amp.scale_loss(loss, self.optimizer, delay_unscale=True) as scaled:
                scaled.backward()  # type: ignore[no-untyped-call]

    def step(self, max_norm: float) -> StepResult:
        """See `Precision.step`. It waits for the device once, to know whether to skip, as apex did."""
        with self._own.in_place():
            (scaler,) = _amp_state.loss_scalers
            with amp.scale_loss(self._zero, self.optimizer, delay_overflow_check=True):
                pass  # what is to be unscaled is there already
            norm, found_inf = clip_if_finite(self._masters, max_norm)
            scaler._overflow_buf = torch.maximum(scaler._overflow_buf, found_inf.float())
            if scaler.update_scale():
                mark_overflow(self.optimizer, 0, scaler)
            self.optimizer.step()
        return StepResult(~found_inf, norm, self._loss_scale)

    def state_dict(self) -> dict[str, Any]:
        """Return `optimizer` and `amp`, the loss scale. Masters are in the state dict of the model."""
        with self._own.in_place():
            return {"optimizer": self.optimizer.state_dict(), "amp": dict(amp.state_dict())}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Precision.load_state_dict`."""
        with self._own.in_place():
            self.optimizer.load_state_dict(state["optimizer"])
            amp.load_state_dict(state["amp"])


class _OwnState:
    """Keeps the state of amp that belongs to one user, and puts it in the place of the process's for a while."""

    def __init__(self) -> None:
        self._state, self._casts = vars(AmpState()), _slots(Casts())
        self._is_in_place = False

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let `apex_compat.amp` be this user's within this context, which may be entered within itself."""
        if self._is_in_place:
            yield
            return
        theirs, their_casts = dict(vars(_amp_state)), _slots(casts)
        self._put(self._state, self._casts)
        handle = self._state.get("handle")
        if handle is not None:
            handle._activate()
        self._is_in_place = True
        try:
            yield
        finally:
            self._is_in_place = False
            self._state, self._casts = dict(vars(_amp_state)), _slots(casts)
            if "handle" in self._state:
                self._state["handle"]._deactivate()
            self._put(theirs, their_casts)

    @staticmethod
    def _put(state: dict[str, Any], slots: dict[str, Any]) -> None:
        vars(_amp_state).clear()
        vars(_amp_state).update(state)
        for name, value in slots.items():
            setattr(casts, name, value)


def _slots(found: Casts) -> dict[str, Any]:
    return {name: getattr(found, name) for name in Casts.__slots__}
