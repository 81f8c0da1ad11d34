"""From apex to torch.amp: does anything get lost? One model under apex's O1 and O2, under torch.amp, and in fp32.

Run it: python examples/from_apex.py
"""

# %%
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roundoff import compare
from roundoff.modes import Build

ROWS, TEST, BATCH, NUMBERS, STEPS, LR = 2048, 4096, 128, 6, 64, 3e-3
MODES = ["apex-o1", "apex-o2", "amp-fp16", "fp32"]


# %%
class MLP(nn.Sequential):
    """Two hidden layers with batch norms, which O2 leaves in fp32."""

    def __init__(self) -> None:
        first, second = (nn.Linear(NUMBERS, 64), nn.BatchNorm1d(64)), (nn.Linear(64, 64), nn.BatchNorm1d(64))
        super().__init__(*first, nn.ReLU(), *second, nn.ReLU(), nn.Linear(64, 1))


def loss(model: nn.Module, rows: Tensor) -> Tensor:
    """Return the mean squared error on some rows, in fp32; what is to be predicted is a product and a wave."""
    targets = rows[:, 0] * rows[:, 1] + torch.sin(2 * rows[:, 2])
    return F.mse_loss(model(rows).float().squeeze(1), targets)


data = torch.randn(ROWS, NUMBERS, generator=torch.Generator().manual_seed(0))
test = torch.randn(TEST, NUMBERS, generator=torch.Generator().manual_seed(1))


# %%
def train(build: Build, seed: int) -> tuple[list[float], float]:
    """Return the losses of a run, and that on the test rows."""
    torch.manual_seed(seed)
    model, losses = MLP(), []
    precision = build(model, lambda parameters: torch.optim.AdamW(parameters, lr=LR))
    for _ in range(STEPS):
        model.zero_grad()
        with precision.forward():
            losses.append(loss(model, data[torch.randint(ROWS, (BATCH,))]))
        precision.backward(losses[-1])
        precision.step(max_norm=1.0)
    with torch.no_grad(), precision.forward():
        return [value.item() for value in losses], loss(model.eval(), test).item()


print(compare(train, MODES, seeds=3, margin=0.03, reference="apex-o1"))

# %% [markdown]
# `amp-fp16` repeats `apex-o1` in every bit: both cast the same operations of this model, and move the loss scale alike.
# `apex-o2` rounds its weights to half, and ends within the margin. So the script can move to torch.amp.
