"""Bring your own model: a small CNN, trained in every precision mode by one loop that knows none of them.

Run it: python examples/cnn.py
"""

# %%
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apex_compat.fp16_utils import FP16_Optimizer, prep_param_lists
from roundoff import Autocast, MasterWeights, Precision, WrappedOptimizer

LR, MOMENTUM, MAX_NORM = 0.05, 0.9, 1.0
STEPS, BATCH, CLASSES, SIZE = 60, 32, 4, 8

# %% [markdown]
# The model is any `nn.Module`. It names no dtype: its weights and autocast decide.


# %%
class CNN(nn.Module):
    """Two convolutions and a linear layer, for images of shape (batch, 1, SIZE, SIZE)."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 8, 3, padding=1)
        self.second = nn.Conv2d(8, 16, 3, padding=1)
        self.classes = nn.Linear(16 * (SIZE // 4) ** 2, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of shape (batch, CLASSES)."""
        features = F.max_pool2d(F.relu(self.first(images)), 2)
        features = F.max_pool2d(F.relu(self.second(features)), 2)
        logits: Tensor = self.classes(features.flatten(1))
        return logits


def batches() -> list[tuple[Tensor, Tensor]]:
    """Images of CLASSES random patterns under noise, fp32 of shape (BATCH, 1, SIZE, SIZE), and their classes."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randn(CLASSES, 1, SIZE, SIZE, generator=generator)
    made = []
    for _ in range(STEPS):
        labels = torch.randint(CLASSES, (BATCH,), generator=generator)
        made.append((patterns[labels] + 0.5 * torch.randn(BATCH, 1, SIZE, SIZE, generator=generator), labels))
    return made


# %% [markdown]
# A mode is what is built around the model. Half weights come first, and the optimizer after them.


# %%
def sgd(parameters: list[nn.Parameter]) -> torch.optim.SGD:
    """The optimizer of all modes."""
    return torch.optim.SGD(parameters, lr=LR, momentum=MOMENTUM)


def fp32(model: nn.Module) -> Precision:
    """No half precision at all."""
    parameters = list(model.parameters())
    return MasterWeights(parameters, sgd(parameters))


def manual(model: nn.Module) -> Precision:
    """Half weights and fp32 master weights."""
    parameters, masters = prep_param_lists(model.half())
    return MasterWeights(parameters, sgd(masters), loss_scale=128.0)


def fp16_optimizer(model: nn.Module) -> Precision:
    """The same by FP16_Optimizer."""
    return WrappedOptimizer(FP16_Optimizer(sgd(list(model.half().parameters())), static_loss_scale=128.0))


def fp16_optimizer_dynamic(model: nn.Module) -> Precision:
    """FP16_Optimizer, looking for the loss scale itself."""
    optimizer = FP16_Optimizer(
        sgd(list(model.half().parameters())),
        dynamic_loss_scale=True,
        dynamic_loss_args={"init_scale": 2.0**16},
        verbose=False,
    )
    return WrappedOptimizer(optimizer)


def amp(dtype: torch.dtype) -> Callable[[nn.Module], Precision]:
    """fp32 weights under autocast; only fp16 needs a loss scale."""

    def build(model: nn.Module) -> Precision:
        scale = None if dtype is torch.float16 else 1.0
        scaler = torch.amp.GradScaler("cpu", init_scale=scale or 2.0**16)
        return Autocast(sgd(list(model.parameters())), scaler, "cpu", dtype, scale)

    return build


MODES: dict[str, Callable[[nn.Module], Precision]] = {
    "fp32": fp32,
    "manual": manual,
    "fp16-optimizer": fp16_optimizer,
    "fp16-optimizer-dynamic": fp16_optimizer_dynamic,
    "amp-fp16": amp(torch.float16),
    "amp-bf16": amp(torch.bfloat16),
    "amp-fp32": amp(torch.float32),
}

# %% [markdown]
# The loop is the same for all of them.


# %%
def train(mode: str) -> tuple[nn.Module, list[float]]:
    """A model trained from one seed, and the loss of each step."""
    torch.manual_seed(0)
    model = CNN()
    precision = MODES[mode](model)
    dtype = next(model.parameters()).dtype
    losses = []
    for images, labels in batches():
        model.zero_grad()
        with precision.forward():
            logits = model(images.to(dtype))
            loss = F.cross_entropy(logits.float(), labels)  # in fp32: half has no room for a softmax
        precision.backward(loss)
        result = precision.step(MAX_NORM)
        losses.append(loss.item())
        if not result.applied:
            print(f"{mode}: a gradient overflowed at loss scale {result.loss_scale.item():g}; the step was skipped")
    return model, losses


# %%
if __name__ == "__main__":
    for name in MODES:
        _, curve = train(name)
        print(f"{name:22} | loss {curve[0]:.4f} -> {sum(curve[-10:]) / 10:.4f}")
