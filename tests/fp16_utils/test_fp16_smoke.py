"""The core in a few lines: an fp32 twin to the last bit, a skip, the sum of two backward passes."""

import pytest
import torch
from torch import nn

import fp16_utils


def regression(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 4, generator=generator), torch.randn(8, 3, generator=generator)


def linear(dtype=torch.float32):
    torch.manual_seed(1)
    return nn.Linear(4, 3).to(dtype)


@pytest.mark.parametrize("scale", [1.0, 1024.0, 2.0**-8])
def test_fp32_parameters_train_as_without_the_wrapper(scale):
    x, y = regression()
    plain, wrapped = linear(), linear()
    sgd = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    optimizer = fp16_utils.FP16_Optimizer(
        torch.optim.SGD(wrapped.parameters(), lr=0.1, momentum=0.9), static_loss_scale=scale
    )
    for _ in range(5):
        plain.zero_grad()
        (plain(x) - y).square().mean().backward()
        norm = torch.nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        sgd.step()
        wrapped.zero_grad()
        optimizer.backward((wrapped(x) - y).square().mean(), update_master_grads=False)
        optimizer.update_master_grads()
        assert optimizer.clip_master_grads(0.5) == norm
        optimizer.step()
    assert torch.equal(plain.weight, wrapped.weight)
    assert torch.equal(plain.bias, wrapped.bias)


def test_an_overflow_is_skipped_and_halves_the_dynamic_scale(capsys):
    model = linear(torch.float16)
    before = model.weight.detach().clone()
    optimizer = fp16_utils.FP16_Optimizer(
        torch.optim.SGD(model.parameters(), lr=0.1), dynamic_loss_scale=True
    )
    optimizer.backward(model.weight.float().sum() * 100.0)
    assert optimizer.overflow
    assert optimizer.loss_scale == 2.0**15
    assert optimizer.clip_master_grads(1.0) == -1
    assert optimizer.inspect_master_grad_data() is None
    assert optimizer.step() is None
    assert torch.equal(model.weight, before)
    assert "65536" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("deferred", [False, True])
def test_two_backward_passes_add_up(dtype, deferred):
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    optimizer = fp16_utils.FP16_Optimizer(torch.optim.SGD([weight], lr=1.0), static_loss_scale=1024.0)
    optimizer.backward(weight.sum() * 3, update_master_grads=not deferred)
    optimizer.backward(weight.sum() * 5, update_master_grads=not deferred)
    if deferred:
        optimizer.update_master_grads()
    assert optimizer.param_groups[0]["params"][0].grad.item() == 8.0
    optimizer.step()
    assert weight.item() == -7.0
