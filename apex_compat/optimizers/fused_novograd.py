"""FusedNovoGrad: NovoGrad, with one norm for each tensor instead of a second moment."""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from apex_compat.optimizers import formulas
from apex_compat.optimizers.fused_optimizer import FusedOptimizer, Work

NORMS = {0: float("inf"), float("inf"): float("inf"), 2: 2.0}
"""What norm_type may be, and the order of the norm that it means. apex calls the largest magnitude 0."""


class FusedNovoGrad(FusedOptimizer):
    """Has the interface of apex.optimizers.FusedNovoGrad.

    n is the running norm of a tensor's gradient, c1 = 1 - beta1^step and c2 = sqrt(1 - beta2^step).
    p -= lr * ((m / c1) / (n / c2 + eps) + weight_decay * p). The state is 'exp_avg', and 'norm', fp32 of shape ().
    `state_dict()` has the norms where apex has them: group['exp_avg_sq'] is a list of two fp32 tensors, the norms
    of the half-precision parameters that have state and of the others.

    Args:
        params: parameters or groups of them.
        lr: learning rate.
        bias_correction: False sets c1 and c2 to 1.
        betas: decay of m and of n.
        eps: added to the norm.
        weight_decay: its factor.
        amsgrad: refused.
        reg_inside_moment: m averages g / (n / c2 + eps) + weight_decay * p, and the step is m / c1.
        grad_averaging: m takes 1 - beta1 of the gradient. False takes all of it.
        norm_type: 2; 0 or inf is the largest magnitude.
        init_zero: n begins at 0. False begins at the first norm.
        set_grad_none: `zero_grad()` sets gradients to None.

    Raises:
        RuntimeError: amsgrad, or another norm_type.
    """

    counts_steps = True
    fp32_state = frozenset({"norm"})
    instead = "torch.optim.SparseAdam"

    def __init__(
        self,
        params: ParamsT,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        reg_inside_moment: bool = False,
        grad_averaging: bool = True,
        norm_type: float = 2,
        init_zero: bool = False,
        set_grad_none: bool = True,
    ) -> None:
        if norm_type not in NORMS:
            raise RuntimeError(f"norm_type is {norm_type}; it must be 2, or 0 or inf for the largest magnitude")
        defaults = {
            "lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps, "weight_decay": weight_decay,
            "grad_averaging": grad_averaging, "norm_type": norm_type, "init_zero": init_zero,
        }  # fmt: skip
        super().__init__(params, defaults, set_grad_none, amsgrad)
        self.moment_mode = int(not reg_inside_moment)

    def _update(self, work: list[Work]) -> None:
        for group, params, grads in work:
            formulas.novograd_(
                params,
                grads,
                self._states(params, "exp_avg"),
                self._norms(params, grads, group),
                lr=group["lr"],
                betas=group["betas"],
                eps=group["eps"],
                step=group["step"],
                bias_correction=group["bias_correction"],
                weight_decay=group["weight_decay"],
                grad_averaging=group["grad_averaging"],
                inside=not self.moment_mode,
                norm_type=NORMS[group["norm_type"]],
            )

    def _norms(self, params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        for param, grad in zip(params, grads, strict=True):
            if "norm" not in self.state[param]:
                norm = torch.linalg.vector_norm(grad, NORMS[group["norm_type"]])
                self.state[param]["norm"] = torch.zeros_like(norm) if group["init_zero"] else norm
        return [self.state[param]["norm"] for param in params]

    def state_dict(self) -> dict[str, Any]:
        """Return the state in apex's layout."""
        packed = super().state_dict()
        for group, saved in zip(self.param_groups, packed["param_groups"], strict=True):
            holders = [param for param in group["params"] if "norm" in self.state.get(param, {})]
            if holders:
                saved["exp_avg_sq"] = [
                    torch.tensor([self.state[param]["norm"].item() for param in holders if _is_half(param) == half])
                    for half in (True, False)
                ]
        packed["state"] = {
            key: {name: value for name, value in state.items() if name != "norm"}
            for key, state in packed["state"].items()
        }
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what `state_dict()` returned, here or in apex.

        Raises:
            ValueError: a group's 'exp_avg_sq' does not have one norm for each parameter with state.
        """
        saved_groups = state_dict["param_groups"]
        norms = [
            pair
            for group, saved in zip(self.param_groups, saved_groups, strict=False)  # torch refuses what does not fit
            for pair in _norms_of(group["params"], saved, state_dict["state"])
        ]
        super().load_state_dict(state_dict)
        for param, norm in norms:
            self.state[param]["norm"] = norm.detach().to(param.device, self._dtype(param, "norm"), copy=True)
        for group in self.param_groups:
            group.pop("exp_avg_sq", None)


def _is_half(param: Tensor) -> bool:
    return param.dtype.itemsize < 4


def _norms_of(params: list[Tensor], saved: dict[str, Any], states: dict[Any, Any]) -> list[tuple[Tensor, Tensor]]:
    """Return each parameter that has saved state with its saved norm.

    A list of one kind alone is in the order of the parameters. It may come from the fp32 masters of half ones.
    """
    halves, others = saved.get("exp_avg_sq", ([], []))
    holders = [p for p, key in zip(params, saved["params"], strict=False) if "exp_avg" in states.get(key, {})]
    mixed = len(halves) > 0 and len(others) > 0
    wanted = sum(map(_is_half, holders)) if mixed else len(halves)
    if "exp_avg_sq" in saved and (len(halves), len(halves) + len(others)) != (wanted, len(holders)):
        raise ValueError(
            f"exp_avg_sq has {len(halves)} norms of half-precision parameters and {len(others)} of others; "
            f"the group has {len(holders)} parameters with state, {sum(map(_is_half, holders))} of half precision"
        )
    if mixed:
        holders = sorted(holders, key=_is_half, reverse=True)  # stable: each kind stays in its order
    return list(zip(holders, [*halves, *others], strict="exp_avg_sq" in saved))
