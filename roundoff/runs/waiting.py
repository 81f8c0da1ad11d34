"""Steps that wait on the device until somebody needs their numbers."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

FIGURES = ("loss", "grad_norm", "loss_scale", "applied")


class WaitingSteps:
    """Keeps the figures of steps in one tensor on the device, so that one wait fetches all of them.

    A tensor for each number would lie in the holes that large tensors leave for the next step.

    Attributes:
        more: names of the further losses of the steps that wait; all of these steps have the same.
    """

    def __init__(self) -> None:
        self._rows: list[dict[str, Any]] = []
        self.more: tuple[str, ...] = ()
        self._figures = torch.empty(0, len(FIGURES))

    def __len__(self) -> int:
        return len(self._rows)

    def add(
        self,
        row: dict[str, Any],
        figures: Sequence[Tensor | float],
        device: torch.device | str,
        more: tuple[str, ...] = (),
    ) -> None:
        """Keep a step.

        Args:
            row: step, epoch and learning rate.
            figures: `FIGURES`, and then further losses, each of one element.
            device: of those that are tensors.
            more: names of the further losses; the same as of all steps that wait.
        """
        n = len(self._rows)
        if n == 0 and more != self.more:
            self.more, self._figures = more, torch.empty(0, len(figures))
        if n == len(self._figures):
            kept, self._figures = self._figures, torch.empty(max(64, 2 * n), len(figures), device=device)
            self._figures[:n] = kept
        values = [torch.as_tensor(v, device=self._figures.device) for v in figures]
        torch.stack([v.detach().float().reshape(()) for v in values], out=self._figures[n])
        self._rows.append(row)

    def fetch(self, average: Callable[[Tensor], Tensor]) -> list[dict[str, Any]]:
        """Return the rows of all steps, for steps.jsonl; `average` is of losses, fp32 of shape (steps,)."""
        figures = self._figures[: len(self._rows)]
        for column in (0, *range(len(FIGURES), len(FIGURES) + len(self.more))):
            figures[:, column] = average(figures[:, column])  # the rest is the same in every process
        rows = []
        for row, (loss, grad_norm, loss_scale, applied, *more) in zip(self._rows, figures.tolist(), strict=True):
            found = {"loss": loss, "grad_norm": grad_norm, "loss_scale": loss_scale, "applied": applied == 1.0}
            rows.append({"step": row["step"], "epoch": row["epoch"], **found, "lr": row["lr"]})
            if self.more:
                rows[-1]["losses"] = dict(zip(self.more, more, strict=True))
        return rows

    def clear(self) -> None:
        """Forget all steps."""
        self._rows.clear()
