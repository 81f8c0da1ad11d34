"""FusedSGD: torch's SGD in every bit, with a decay after the momentum, and amp's scaled gradients."""

from itertools import chain

from torch import Tensor
from torch.optim.optimizer import ParamsT, required

from apex_compat.optimizers import formulas
from apex_compat.optimizers.fused_optimizer import FusedOptimizer, Work


class FusedSGD(FusedOptimizer):
    """Has the interface of apex.optimizers.FusedSGD, and the bits of torch.optim.SGD.

    The state is 'momentum_buffer'. A parameter's first momentum is its gradient, undampened, whenever it joins.

    Under amp with master weights, amp writes the masters to the half parameters after each step. With
    materialize_master_grads=False the masters get no gradients: `step` takes those of the half parameters, which it
    finds by `_amp_stash.fp16_groups` and `_amp_stash.fp32_from_fp16_groups`. All gradients are `most_recent_scale`
    times too large then. amp sets `most_recent_scale` and `scale_set_by_backward` after a backward pass, and `step`
    sets them back to 1.0 and False.

    Args:
        params: parameters or groups of them.
        lr: learning rate. It is required here or in each group.
        momentum: its factor.
        dampening: a later momentum takes 1 - dampening of the gradient.
        weight_decay: its factor.
        nesterov: Nesterov's momentum.
        wd_after_momentum: add the decay to the step, not to the gradient.
        materialize_master_grads: see above.
        set_grad_none: `zero_grad()` sets gradients to None. Without it they become zero, and stay.

    Raises:
        ValueError: lr, momentum or weight_decay is negative; nesterov without momentum, or with dampening; no lr.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float = required,  # type: ignore[assignment]  # torch's mark for "each group has its own"
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        wd_after_momentum: bool = False,
        materialize_master_grads: bool = True,
        set_grad_none: bool = False,
    ) -> None:
        for name, value in {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}.items():
            if isinstance(value, int | float) and value < 0:
                raise ValueError(f"{name} is {value}; it must be 0 or more")
        if nesterov and (momentum <= 0 or dampening != 0):
            raise ValueError(f"nesterov needs a momentum above 0 and no dampening, not {momentum} and {dampening}")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "nesterov": nesterov
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none)
        self.wd_after_momentum = wd_after_momentum
        self.materialize_master_grads = materialize_master_grads
        self.most_recent_scale = 1.0
        self.scale_set_by_backward = False

    def _holders(self) -> dict[Tensor, Tensor]:
        """Return each master of amp's with its half parameter, if the masters get no gradients."""
        if self.materialize_master_grads:
            return {}
        stash = getattr(self, "_amp_stash", None)
        masters = chain.from_iterable(getattr(stash, "fp32_from_fp16_groups", []))
        return dict(zip(masters, chain.from_iterable(getattr(stash, "fp16_groups", [])), strict=True))

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            new = [group["momentum"] != 0 and self.state[p].get("momentum_buffer") is None for p in params]
            for first_run in (True, False):
                some = [param for param, is_new in zip(params, new, strict=True) if is_new == first_run]
                formulas.sgd_(
                    some,
                    [grad for grad, is_new in zip(grads, new, strict=True) if is_new == first_run],
                    self._states(some, "momentum_buffer") if group["momentum"] else [],
                    lr=group["lr"],
                    momentum=group["momentum"],
                    dampening=group["dampening"],
                    weight_decay=group["weight_decay"],
                    nesterov=group["nesterov"],
                    wd_after_momentum=self.wd_after_momentum,
                    first_run=first_run,
                    scale=1.0 / self.most_recent_scale,
                )
        self.most_recent_scale = 1.0
        self.scale_set_by_backward = False
