"""What a probe costs, over the size of the model: any model's by `roundoff.probe`, and the language model's."""

import contextlib
import io
import math

import torch
from torch import Tensor, nn

from benchmarks.growth.axes import GrowthAxis
from benchmarks.measure import Cost
from benchmarks.probe_cost import probe_once
from benchmarks.processes import fresh
from lm.data import corpora
from roundoff.gradients.statistics import LEAST_BATCHES
from roundoff.library.probing import probe

LAYERS, ROWS, BATCHES = 4, 32, 8


def probe_mlp(parameters: int) -> Cost:
    """Probe a perceptron of `LAYERS` square layers with about so many parameters, in the default modes."""
    width = round(math.sqrt(parameters / LAYERS))
    layers = [layer for _ in range(LAYERS) for layer in (nn.Linear(width, width), nn.Tanh())]
    batches = [torch.randn(ROWS, width) for _ in range(BATCHES)]
    with contextlib.redirect_stdout(io.StringIO()):  # it says what it does
        result = probe(nn.Sequential(*layers), _loss, batches).result
    return Cost([result["seconds"]], result["peak_memory_bytes"] / 2**20)


def _loss(model: nn.Module, batch: Tensor) -> Tensor:
    loss: Tensor = model(batch).float().square().mean()
    return loss


AXES = {
    "probe-mlp": GrowthAxis(
        "parameters of a perceptron",
        (10_000, 100_000, 1_000_000, 10_000_000),
        lambda value: {"probe": fresh(probe_mlp, value)},
        f"probe, {BATCHES} batches",
    ),
    "probe-lm": GrowthAxis(
        "units of the language model",
        (50, 100, 200, 400),
        lambda value: {"probe": fresh(probe_once, corpora.DEFAULT, value, LEAST_BATCHES)},
        f"probe, {LEAST_BATCHES} batches",
    ),
}
