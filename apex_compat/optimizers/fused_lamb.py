"""FusedLAMB: LAMB with one gradient norm over all parameters."""

from torch.optim.optimizer import ParamsT

from apex_compat.optimizers import formulas
from apex_compat.optimizers.fused_optimizer import FusedOptimizer, Work


class FusedLAMB(FusedOptimizer):
    """Has the interface of apex.optimizers.FusedLAMB.

    The gradients of all groups are divided by norm / max_grad_norm if their norm is larger. Then u is Adam's
    direction plus weight_decay * p, and p -= lr * |p| / |u| * u for each tensor. A tensor takes lr alone if a norm is
    0. So does a group without weight decay, unless use_nvlamb. `.grad` stays as it is; apex left u in it.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        bias_correction: False sets Adam's c1 and c2 to 1.
        betas: decay of both moments.
        eps: added to the root.
        weight_decay: its factor.
        amsgrad: refused.
        adam_w_mode: decoupled weight decay. False adds it to the clipped gradient.
        grad_averaging: the first moment takes 1 - beta1 of the gradient. False takes all of it.
        set_grad_none: `zero_grad()` sets gradients to None.
        max_grad_norm: one bound for the optimizer. A group cannot have its own.
        use_nvlamb: adapt lr in groups without weight decay too.

    Raises:
        RuntimeError: amsgrad.
    """

    counts_steps = True
    instead = "torch.optim.SparseAdam"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.01,
        amsgrad: bool = False,
        adam_w_mode: bool = True,
        grad_averaging: bool = True,
        set_grad_none: bool = True,
        max_grad_norm: float = 1.0,
        use_nvlamb: bool = False,
    ) -> None:
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "max_grad_norm": max_grad_norm,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none, amsgrad)
        self.adam_w_mode = int(adam_w_mode)
        self.use_nvlamb = use_nvlamb

    def _update(self, work: list[Work]) -> None:
        norm = formulas.grad_norm([grad for _, _, grads in work for grad in grads])
        for group, params, grads in work:
            formulas.lamb_(
                params,
                grads,
                self._states(params, "exp_avg"),
                self._states(params, "exp_avg_sq"),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                step=group["step"],
                bias_correction=group["bias_correction"],
                weight_decay=group["weight_decay"],
                grad_averaging=group["grad_averaging"],
                decoupled=bool(self.adam_w_mode),
                norm=norm,
                max_norm=self.defaults["max_grad_norm"],
                always_adapt=self.use_nvlamb,
            )
