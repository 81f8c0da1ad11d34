"""A tabular MLP with AdamW: half weights need fp32 masters, and the probe says so before a run does.

Run it: python examples/tabular.py

It needs the pages' packages: pip install 'roundoff[report]'.
"""

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from roundoff import compare, probe
from roundoff.modes import Build

ROWS, TEST, BATCH, NUMBERS, KINDS, EPOCHS, LR = 4096, 1024, 128, 8, 5, 12, 1e-3
MODES = ["fp32", "amp-bf16", "masters-bf16", "bf16-weights"]
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="tabular-"))
print(f"| the probe's pages go to {folder}")

# %% [markdown]
# The model has two inputs: NUMBERS columns of numbers, and one of KINDS kinds.


# %%
class MLP(nn.Module):
    """Two hidden layers, and an embedding of the kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds = nn.Embedding(KINDS, 4)
        self.layers = nn.Sequential(
            nn.Linear(NUMBERS + 4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        """Return predictions of shape (batch,)."""
        predicted: Tensor = self.layers(torch.cat((numbers.to(self.kinds.weight.dtype), self.kinds(kinds)), 1))
        return predicted.squeeze(1)


def loss(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """Return the mean squared error, in fp32."""
    numbers, kinds, targets = batch
    return F.mse_loss(model(numbers, kinds).float(), targets.float())


# %% [markdown]
# The data: a product, a wave, a step of each kind, and noise of variance 0.01.


# %%
def table(rows: int, seed: int) -> tuple[Tensor, ...]:
    """Return numbers, kinds and targets."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randn(rows, NUMBERS, generator=generator)
    kinds = torch.randint(KINDS, (rows,), generator=generator)
    targets = numbers[:, 0] * numbers[:, 1] + torch.sin(2 * numbers[:, 2]) + 0.5 * kinds * (numbers[:, 3] > 0)
    return numbers, kinds, targets + 0.1 * torch.randn(rows, generator=generator)


data, test = table(ROWS, seed=0), table(TEST, seed=1)


def batch(rows: Tensor) -> tuple[Tensor, ...]:
    """Return some rows of the data."""
    return tuple(column[rows] for column in data)


# %% [markdown]
# The probe, at fresh weights. Its column "stagnated" is of a plain SGD step with the learning rate that it is given.

# %%
report = probe(MLP(), loss, [batch(rows) for rows in torch.arange(ROWS).view(-1, BATCH)[:8]], MODES, lr=LR)
print(report)
report.save(folder)


# %%
def train(build: Build, seed: int) -> tuple[list[float], float]:
    """Return the losses of a run, and that on the test rows."""
    torch.manual_seed(seed)
    model, losses = MLP(), []
    precision = build(model, lambda parameters: torch.optim.AdamW(parameters, lr=LR))
    for rows in torch.cat([torch.randperm(ROWS) for _ in range(EPOCHS)]).view(-1, BATCH):
        model.zero_grad()
        with precision.forward():
            losses.append(loss(model, batch(rows)))
        precision.backward(losses[-1])
        precision.step(max_norm=1.0)
    with torch.no_grad(), precision.forward():
        return [value.item() for value in losses], loss(model, test).item()


print(compare(train, MODES, seeds=3))

# %% [markdown]
# The probe counts that bf16 weights round away nine of ten updates, though their gradient is as good as that of
# `masters-bf16`. In training `bf16-weights` ends worse in each seed; with fp32 masters it ends as fp32 does.
