"""The optimizers of the trainers: torch's own in every bit, without the compiler's front end."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from lm.training.eager_optimizer import METHODS, eager

KINDS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "sgd": (SGD, {"lr": 0.1}),
    "fused": (SGD, {"lr": 0.1, "fused": True}),
    "momentum": (SGD, {"lr": 0.1, "momentum": 0.9, "fused": True}),
    "adamw": (AdamW, {"lr": 0.1, "fused": True}),
    "differentiable": (SGD, {"lr": 0.1, "differentiable": True}),
}


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every import of `torch._dynamo` fail, also where torch keeps what an earlier one gave."""
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)
    for name in METHODS:
        marked = getattr(getattr(Optimizer, name, None), "__wrapped__", None)
        monkeypatch.delattr(marked, "__dynamo_disable", raising=False)


def trained(make: Callable[..., Optimizer], options: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any], list[str]]:
    """Return weights, state, and what autograd recorded last of each weight, after calls of every method."""
    differentiable = options.get("differentiable", False)
    random = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=random)) for shape in ((3, 4), (5,))]
    if differentiable:
        params = [param.clone() for param in params]  # torch updates no leaf where it records the update
    optimizer = make(params[:1], **options)
    optimizer.add_param_group({"params": params[1:], "lr": 0.01})
    for step in range(3):
        for param in params:
            param.grad = torch.full_like(param, 0.5 + step)
        with torch.set_grad_enabled(not differentiable):  # a step sets its own
            optimizer.step()
        optimizer.zero_grad()
        optimizer.load_state_dict(optimizer.state_dict())
    recorded = [param.grad_fn.name() if param.grad_fn else "" for param in params]
    return [param.detach() for param in params], optimizer.state_dict(), recorded


@pytest.mark.parametrize("name", KINDS)
def test_it_is_torchs_own_without_the_compiler(name: str, request: pytest.FixtureRequest) -> None:
    kind, options = KINDS[name]
    expected = trained(kind, options)
    request.getfixturevalue("no_compiler")
    found = trained(eager(kind), options)
    torch.testing.assert_close(found[:2], expected[:2], rtol=0, atol=0)
    assert found[2] == expected[2]
    assert issubclass(eager(kind), kind)
    assert eager(kind).__name__ == kind.__name__


def test_a_mark_that_is_not_known_stays() -> None:
    class Marked(SGD):
        @functools.wraps(SGD.step)
        def step(self, closure: Any = None) -> float:
            return 3.0

    assert eager(Marked)([nn.Parameter(torch.ones(1))], lr=0.1).step() == 3.0
