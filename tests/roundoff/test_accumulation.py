"""A batch in parts: `backward` for each and one `step` is the step of the whole batch, but for rounding."""

import pytest
import torch
from torch import nn

from roundoff import Precision
from roundoff.modes import STOCK

PARTS = 4
SUMS = {  # the dtype in which the parts add up, as docs/your-model.md has it; its rounding
    "fp32": (torch.float32, 2.0**-22),
    "masters-fp16": (torch.float16, 2.0**-9),
    "masters-bf16": (torch.bfloat16, 2.0**-6),
    "amp-fp16": (torch.float32, 2.0**-9),
    "amp-bf16": (torch.float32, 2.0**-6),
    "bf16-weights": (torch.bfloat16, 2.0**-6),
    "apex-o1": (torch.float32, 2.0**-9),
    "apex-o2": (torch.float16, 2.0**-9),
}


def made(mode: str) -> tuple[nn.Module, Precision]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4))
    return model, STOCK[mode](model, lambda parameters: torch.optim.SGD(parameters, lr=1.0))


def masters(precision: Precision) -> list[torch.Tensor]:
    return [p.detach().clone() for group in precision.optimizer.param_groups for p in group["params"]]


def backward(model: nn.Module, precision: Precision, x: torch.Tensor, share: float) -> None:
    with precision.forward():
        loss = model(x.to(next(model.parameters()).dtype)).float().square().mean()
    precision.backward(loss * share)


def batch() -> torch.Tensor:
    return torch.randn(32, 8, generator=torch.Generator().manual_seed(0))


def test_every_stock_mode_is_here() -> None:
    assert SUMS.keys() == STOCK.keys()


@pytest.mark.parametrize("mode", SUMS)
def test_parts_are_the_whole_batch_within_rounding(mode: str) -> None:
    """Gradients of the parts, each taken alone, are summed here in the dtype that the table says: the same bits."""
    (whole, whole_precision), (model, precision) = made(mode), made(mode)
    dtype, rounding = SUMS[mode]
    sums = [torch.zeros_like(p, dtype=dtype) for p in model.parameters()]
    for x in batch().chunk(PARTS):
        model.zero_grad()
        backward(model, precision, x, 1 / PARTS)
        sums = [total + p.grad for total, p in zip(sums, model.parameters(), strict=True) if p.grad is not None]
    model.zero_grad()
    for x in batch().chunk(PARTS):
        backward(model, precision, x, 1 / PARTS)
    assert [total.tolist() for total in sums] == [p.grad.tolist() for p in model.parameters() if p.grad is not None]
    assert {total.dtype for total in sums} == {dtype}

    backward(whole, whole_precision, batch(), 1.0)
    before = masters(precision)
    norm, expected = precision.step(100.0).grad_norm, whole_precision.step(100.0).grad_norm
    assert float(norm) == pytest.approx(float(expected), rel=rounding)
    if mode != "bf16-weights":  # whose weights have not the bits to show the update
        updates = [
            torch.cat([(b - a).flatten() for a, b in zip(before, masters(p), strict=True)])
            for p in (precision, whole_precision)
        ]
        assert float((updates[0] - updates[1]).norm()) < rounding * float(updates[1].norm())
        assert float(updates[1].norm()) > 0.1


@pytest.mark.parametrize("bad", range(PARTS))
@pytest.mark.parametrize("mode", SUMS)
def test_an_inf_in_any_part_skips_the_step(mode: str, bad: int) -> None:
    model, precision = made(mode)
    before = masters(precision)
    for k, x in enumerate(batch().chunk(PARTS)):
        backward(model, precision, x, 1 / PARTS)
        if k == bad:
            next(p.grad for p in model.parameters() if p.grad is not None)[0, 0] = torch.inf
    assert not precision.step(100.0).applied
    assert [p.tolist() for p in masters(precision)] == [p.tolist() for p in before]
