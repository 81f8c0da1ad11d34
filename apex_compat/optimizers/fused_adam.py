"""FusedAdam: Adam and AdamW with fp32 moments for parameters of any dtype."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from apex_compat.optimizers import formulas
from apex_compat.optimizers.fused_optimizer import FusedOptimizer, Work


class FusedAdam(FusedOptimizer):
    """Has the interface of apex.optimizers.FusedAdam.

    p -= lr * ((m / c1) / (sqrt(v / c2) + eps) + weight_decay * p), where c1 and c2 are 1 - beta^step. With
    adam_w_mode=False the decay is added to the gradient instead. The state is 'exp_avg' and 'exp_avg_sq', in fp32.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        bias_correction: False sets c1 and c2 to 1.
        betas: decay of both moments.
        eps: added to the root.
        adam_w_mode: decoupled weight decay.
        weight_decay: its factor.
        amsgrad: refused.
        set_grad_none: `zero_grad()` sets gradients to None.
        capturable: refused where True.
        master_weights: refused where True.

    Raises:
        RuntimeError: amsgrad, or master_weights without capturable.
        NotImplementedError: capturable.
    """

    counts_steps = True
    fp32_state = frozenset({"exp_avg", "exp_avg_sq"})
    instead = "torch.optim.SparseAdam"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        if master_weights and not capturable:
            raise RuntimeError("FusedAdam(master_weights=True) needs capturable=True, which is not offered: use amp O2")
        if capturable:
            raise NotImplementedError(
                "FusedAdam(capturable=True) is not offered: use torch.optim.AdamW(fused=True, capturable=True)"
            )
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none, amsgrad)
        self.adam_w_mode = int(adam_w_mode)

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], Any] | None = None,
        grads: list[Tensor] | None = None,
        output_params: list[Tensor] | None = None,
        scale: float | None = None,
        grad_norms: list[Tensor] | None = None,
        grad_scaler: torch.amp.GradScaler | None = None,
    ) -> Any:
        """Take a step and return what `closure` returns, which is called first, with gradients enabled.

        Raises:
            RuntimeError: another argument is given, or a gradient is sparse. Nothing was changed then.
        """
        if any(argument is not None for argument in (grads, output_params, scale, grad_norms)):
            raise RuntimeError("FusedAdam.step reads .grad alone: leave out grads, output_params, scale and grad_norms")
        if grad_scaler is not None:
            raise RuntimeError("FusedAdam.step takes no grad_scaler: call grad_scaler.step(optimizer)")
        return super().step(closure)

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            formulas.adam_(
                params,
                grads,
                self._states(params, "exp_avg"),
                self._states(params, "exp_avg_sq"),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                step=group["step"],
                decoupled=bool(self.adam_w_mode),
                bias_correction=group["bias_correction"],
                weight_decay=group["weight_decay"],
            )
