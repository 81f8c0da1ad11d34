"""Small models, losses with injected values, and comparisons to the last bit."""

import torch
from torch import nn

from apex_compat import fp16_utils


def problem(seed=0, rows=8):
    """Return inputs (rows, 4) and targets (rows, 3)."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 4, generator=generator), torch.randn(rows, 3, generator=generator)


def mlp(dtype=torch.float32, seed=1):
    """Return a two-layer network, 4 inputs and 3 outputs; every call gives the same fp32 draw, rounded."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def mixed(half=torch.float16, seed=1):
    """Return a network whose first layer is in `half` and whose second is in fp32."""
    network = mlp(seed=seed)
    network[0].to(half)
    network.insert(2, Cast())
    return network


class Cast(nn.Module):
    def forward(self, x):
        return x.float()


def loss_of(network, x, y):
    """Return the mean squared error in fp32; the input takes the dtype of the first weight."""
    first = next(network.parameters())
    return (network(x.to(first.dtype)).float() - y).square().mean()


def wrap(optimizer, **kwargs):
    return fp16_utils.FP16_Optimizer(optimizer, **{"verbose": False, **kwargs})


def train(network, optimizer, steps=5, max_norm=None, deferred=False):
    """Train on `problem`, with two half batches a step if `deferred`; `optimizer` is an FP16_Optimizer."""
    for i in range(steps):
        optimizer.zero_grad()
        x, y = problem(seed=i)
        if deferred:
            optimizer.backward(loss_of(network, x[:4], y[:4]), update_master_grads=False)
            optimizer.backward(loss_of(network, x[4:], y[4:]), update_master_grads=False)
            optimizer.update_master_grads()
        else:
            optimizer.backward(loss_of(network, x, y))
        if max_norm is not None:
            optimizer.clip_master_grads(max_norm)
        optimizer.step()


def snapshot(*holders):
    """Return copies of all tensors in modules, optimizers' groups and states, tensors, lists and dicts."""
    found = []

    def visit(value):
        if isinstance(value, torch.Tensor):
            found.append(value.detach().clone())
        elif isinstance(value, nn.Module):
            visit(list(value.state_dict().values()))
        elif isinstance(value, torch.optim.Optimizer):
            visit([group["params"] for group in value.param_groups])
            visit(list(value.state.values()))
        elif isinstance(value, dict):
            visit(list(value.values()))
        elif isinstance(value, list | tuple):
            for item in value:
                visit(item)
        else:
            found.append(value)

    visit(list(holders))
    return found


def same(first, second):
    """Say whether two snapshots are equal to the last bit (a nan equals a nan), dtypes included."""
    if len(first) != len(second):
        return False
    return all(
        a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.nan_to_num(nan=7e77), b.nan_to_num(nan=7e77))
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
        else a == b
        for a, b in zip(first, second, strict=True)
    )
