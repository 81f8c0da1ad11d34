"""The cost of apex_compat.amp: a patched operation against torch's own, and a step of O2 against FP16_Optimizer's."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apex_compat import amp
from apex_compat.fp16_utils import FP16_Optimizer
from benchmarks.measure import REFERENCE, Row, compared, interleaved

CALLS = 2000  # of an operation in one timing
LAYERS, WIDTH = 13, 1000  # 13 million parameters
LR = 1e-3


def measure_amp(rounds: int, device: str = "cpu") -> list[Row]:
    """Measure the microseconds that O1 adds to an operation, and O2's step with its backward pass."""
    return [*_operations(rounds, device), *_steps(rounds, device)]


def repeated(function: Callable[..., Tensor], *args: Tensor) -> Callable[[], None]:
    """Return a function that calls `function` `CALLS` times."""

    def run() -> None:
        for _ in range(CALLS):
            function(*args)

    return run


def _operations(rounds: int, device: str) -> list[Row]:
    """Compare patched functions with the originals on arguments that need no cast, the weight being cached."""
    layer = nn.Linear(8, 8, bias=False).to(device)
    x = torch.randn(8, 8, device=device).half()
    weight = layer.weight.detach().half().requires_grad_()
    originals = torch.mul, F.linear
    amp.initialize(layer, torch.optim.SGD(layer.parameters(), lr=LR), opt_level="O1", verbosity=0)
    pairs = {
        "mul 8x8": (repeated(originals[0], x, x), repeated(torch.mul, x, x)),
        "linear 8x8": (repeated(originals[1], x, weight), repeated(F.linear, x, layer.weight)),
    }
    rows: list[Row] = []
    for name, (bare, patched) in pairs.items():
        # Processor time: the cost is Python's, and other programs change it less.
        seconds = interleaved({REFERENCE: bare, name: patched}, rounds, clock=time.process_time, device=device)
        each = {key: [1e6 * value / CALLS for value in values] for key, values in seconds.items()}
        (row,) = compared("amp", None, each, faster=False)
        added = row["ours"]["min"] - row["reference"]["min"]  # the shortest: other programs lengthen the rest
        rows.append(row | {"unit": "us"})
        rows.append({"part": "amp", "size": None, "name": f"{name}, added", "value": added, "unit": "us"})
    amp._amp_state.handle._deactivate()
    return rows


def _steps(rounds: int, device: str) -> list[Row]:
    """Compare `scale_loss`, backward and step of O2 with backward and step of FP16_Optimizer, both dynamic."""
    names = (REFERENCE, "scale_loss, step")
    models = {name: nn.ParameterList([torch.randn(WIDTH, WIDTH) for _ in range(LAYERS)]).to(device) for name in names}
    models[REFERENCE].half()
    wrapped = FP16_Optimizer(_sgd(models[REFERENCE]), dynamic_loss_scale=True, verbose=False)
    model, optimizer = amp.initialize(models[names[1]], _sgd(models[names[1]]), opt_level="O2", verbosity=0)

    def reference() -> None:
        wrapped.zero_grad()
        wrapped.backward(_loss(models[REFERENCE]))
        wrapped.step()

    def ours() -> None:
        optimizer.zero_grad()
        with amp.scale_loss(_loss(model), optimizer) as scaled:
            scaled.backward()  # type: ignore[no-untyped-call]  # torch's method has no types
        optimizer.step()

    return compared(
        "amp", None, interleaved({REFERENCE: reference, names[1]: ours}, rounds, device=device), faster=False
    )


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9)


def _loss(model: nn.ParameterList) -> Tensor:
    """Return a loss that is cheap beside the step."""
    return torch.stack([param.float().mean() for param in model]).sum()
