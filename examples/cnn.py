"""Bring your own model: a CNN with BatchNorm, probed, and trained in every precision mode by one loop.

Run it: python examples/cnn.py

It needs the pages' packages: pip install 'roundoff[report]'.
"""

# %% [markdown]
# In Colab, upload the wheel (`python -m build`). Run `%pip install "roundoff-0.2.0-py3-none-any.whl[report]"` first.

# %%
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from apex_compat.fp16_utils import FP16_Optimizer, convert_network
from roundoff import Precision, WrappedOptimizer, compare, probe
from roundoff.modes import Build, MakeOptimizer

LR, MOMENTUM, MAX_NORM = 0.05, 0.9, 1.0
STEPS, BATCH, CLASSES, SIZE = 60, 32, 4, 8
torch.manual_seed(0)
folder = Path(tempfile.mkdtemp(prefix="cnn-"))
print(f"| the pages go to {folder}")

# %% [markdown]
# The model is any `nn.Module`. The model names no dtype: its weights and autocast decide.


# %%
class CNN(nn.Module):
    """Two convolutions, each with a BatchNorm, and a linear layer; images have the shape (batch, 1, SIZE, SIZE)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.first_norm = nn.Conv2d(1, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.second, self.second_norm = nn.Conv2d(8, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.classes = nn.Linear(16 * (SIZE // 4) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of shape (batch, CLASSES)."""
        features = F.max_pool2d(F.relu(self.first_norm(self.first(images))), 2)
        features = F.max_pool2d(F.relu(self.second_norm(self.second(features))), 2)
        logits: Tensor = self.classes(features.flatten(1))
        return logits


def batches() -> list[tuple[Tensor, Tensor]]:
    """Return images of CLASSES random patterns under noise, and their classes."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=generator)
    made = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        made.append((patterns[labels] + 0.5 * torch.randn(BATCH, 1, SIZE, SIZE, generator=generator), labels))
    return made


# %% [markdown]
# A mode is a name, or a function that builds the precision management around the model. Half weights come first, the
# optimizer second.


# %%
def sgd(parameters: list[nn.Parameter]) -> Optimizer:
    """Return the optimizer of all modes."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def fp16_optimizer(model: nn.Module, make_optimizer: MakeOptimizer = sgd) -> Precision:
    """Half weights (BatchNorm stays in fp32) and fp32 masters, kept by FP16_Optimizer."""
    parameters = list(convert_network(model, torch.float16).parameters())
    return WrappedOptimizer(FP16_Optimizer(make_optimizer(parameters), static_loss_scale=128.0, verbose=False))


MODES: dict[str, str | Build] = {name: name for name in ("fp32", "masters-fp16", "amp-fp16", "amp-bf16")}
MODES["fp16-optimizer"] = fp16_optimizer


# %% [markdown]
# The loop is the same for all of them, and knows none of them.


# %%
def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """Return the loss in fp32: half has no room for a softmax."""
    images, labels = batch
    return F.cross_entropy(model(images.to(next(model.parameters()).dtype)).float(), labels)


def train(build: Build, seed: int) -> list[float]:
    """Return the losses of a run."""
    torch.manual_seed(seed)
    model = CNN()
    precision = build(model, sgd)
    losses = []
    for batch in batches():
        model.zero_grad()
        with precision.forward():
            value = loss(model, batch)
        precision.backward(value)
        precision.step(MAX_NORM)
        losses.append(value.item())
    return losses


# %%
report = probe(CNN(), loss, batches()[:16], MODES)
print(report)
report.save(folder / "probe")

# %%
comparison = compare(train, MODES, seeds=2)
print(comparison)
comparison.save(folder / "comparison")

# %% [markdown]
# `masters-fp16` and `fp16-optimizer` agree in every figure and every loss: they are one algorithm, written twice.
# BatchNorm makes the errors larger than in other models, and still each mode's is under a tenth of the noise.
