"""FusedAdagrad: Adagrad without a decay of the learning rate."""

from torch.optim.optimizer import ParamsT

from apex_compat.optimizers import formulas
from apex_compat.optimizers.fused_optimizer import FusedOptimizer, Work


class FusedAdagrad(FusedOptimizer):
    """Has the interface of apex.optimizers.FusedAdagrad.

    h += g^2; p -= lr * g / (sqrt(h) + eps). The state is 'sum', which is h.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        eps: added to the root.
        weight_decay: its factor.
        set_grad_none: `zero_grad()` sets gradients to None.
        adagrad_w_mode: decoupled weight decay. False adds it to the gradient.
    """

    instead = "torch.optim.Adagrad"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-2,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        set_grad_none: bool = True,
        adagrad_w_mode: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "eps": eps, "weight_decay": weight_decay}, set_grad_none)
        self.adagrad_w_mode = int(adagrad_w_mode)

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            formulas.adagrad_(
                params,
                grads,
                self._states(params, "sum"),
                lr=group["lr"],
                eps=group["eps"],
                decoupled=bool(self.adagrad_w_mode),
                weight_decay=group["weight_decay"],
            )
