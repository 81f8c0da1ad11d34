"""Cases for FP16_Optimizer: small networks, optimizers, the same training by hand, comparisons to the last bit."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from apex_compat import fp16_utils

INF, NAN = float("inf"), float("nan")
HALVES = [torch.float16, torch.bfloat16]
DTYPES = [*HALVES, torch.float32]


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


def tied(dtype=torch.float16):
    """Return a network that applies one layer twice."""
    torch.manual_seed(1)
    layer = nn.Linear(4, 4)
    return nn.Sequential(layer, nn.Tanh(), layer, nn.Tanh(), nn.Linear(4, 3)).to(dtype)


class Rows(nn.Module):
    """Looks up a row for each input, with repetitions."""

    def __init__(self, dtype, sparse=True):
        super().__init__()
        torch.manual_seed(1)
        self.rows = nn.Embedding(6, 3, sparse=sparse, dtype=dtype)
        self.out = nn.Linear(3, 3, dtype=dtype)

    def forward(self, x):
        return self.out(self.rows((x[:, 0].float() * 2).long() % 6))


def loss_of(network, x, y):
    """Return the mean squared error in fp32; the input takes the dtype of the first weight."""
    first = next(network.parameters())
    return (network(x.to(first.dtype)).float() - y).square().mean()


def halves_of(i, count):
    """Return batch i in `count` parts."""
    x, y = problem(i)
    return list(zip(x.chunk(count), y.chunk(count), strict=True))


def wrap(optimizer, **kwargs):
    return fp16_utils.FP16_Optimizer(optimizer, **{"verbose": False, **kwargs})


def train(network, optimizer, steps=5):
    for i in range(steps):
        optimizer.zero_grad()
        optimizer.backward(loss_of(network, *problem(i)))
        optimizer.step()


OPTIMIZERS = {
    "sgd": lambda p, **kw: torch.optim.SGD(p, lr=0.1, **kw),
    "momentum": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, **kw),
    "dampened": lambda p, **kw: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5, **kw),
    "adam": lambda p, **kw: torch.optim.Adam(p, lr=0.01, amsgrad=True, **kw),
    "adamw": lambda p, **kw: torch.optim.AdamW(p, lr=0.01, **kw),
    "rmsprop": lambda p, **kw: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, **kw),
}


class Case(NamedTuple):
    network: Callable
    optimizer: Callable = OPTIMIZERS["momentum"]
    two_groups: bool = False
    limits: frozenset = frozenset()
    """What torch itself cannot do here: "sums" of two gradients, their "norm", "fused momentum" begun late."""

    def groups(self, params):
        params = list(params)
        return [{"params": params[:2]}, {"params": params[2:], "lr": 0.5}] if self.two_groups else params

    def build(self, **kwargs):
        """Return a network and its FP16_Optimizer."""
        network = self.network()
        return network, wrap(self.optimizer(self.groups(network.parameters())), **kwargs)


def _variant(name, **kwargs):
    limits = {"fused momentum"} if kwargs.get("fused") and name in {"momentum", "dampened"} else {}
    return Case(mixed, lambda p: OPTIMIZERS[name](p, **kwargs), limits=frozenset(limits))


CASES = {
    "fp32": Case(mlp),
    "fp16": Case(lambda: mlp(torch.float16)),
    "bf16": Case(lambda: mlp(torch.bfloat16)),
    "bf16 and fp32": Case(lambda: mixed(torch.bfloat16)),
    "two groups": Case(mixed, two_groups=True),
    "tied": Case(tied),
    "sparse fp16": Case(lambda: Rows(torch.float16), OPTIMIZERS["sgd"], limits=frozenset({"sums", "norm"})),
    "sparse fp32": Case(lambda: Rows(torch.float32), OPTIMIZERS["sgd"], limits=frozenset({"norm"})),
    "momentum": _variant("momentum"),
    "momentum fused": _variant("momentum", fused=True),
    "adam": _variant("adam"),
    "adamw fused": _variant("adamw", fused=True),
}
VARIANTS = {
    **{name: _variant(name) for name in OPTIMIZERS},
    **{f"{name} foreach": _variant(name, foreach=True) for name in OPTIMIZERS},
    **{f"{name} fused": _variant(name, fused=True) for name in OPTIMIZERS if name != "rmsprop"},
}
VARIANTS = {name: case for name, case in VARIANTS.items() if name not in CASES}
"""What remains of the wrapped optimizers and their implementations."""


class ByHand:
    """The training of a case in plain PyTorch: scale the loss, unscale, clip, update masters, copy to the model."""

    def __init__(self, case, scale=2.0**10):
        self.network = case.network()
        self.scale = scale
        self.params = list(self.network.parameters())
        self.masters = [p if p.dtype == torch.float32 else p.detach().float().requires_grad_() for p in self.params]
        self.optimizer = case.optimizer(case.groups(self.masters))

    def step(self, i, clip=None, parts=1):
        """Take one step; return the norm of the gradients before clipping, if `clip` has max_norm and norm_type."""
        self.network.zero_grad()
        for x, y in halves_of(i, parts):
            (loss_of(self.network, x, y) * self.scale).backward()
        for param, master in zip(self.params, self.masters, strict=True):
            grad = None if param.grad is None else param.grad.float() * (1 / self.scale)
            master.grad = grad.coalesce() if grad is not None and grad.is_sparse else grad
        norm = torch.nn.utils.clip_grad_norm_(self.masters, *clip) if clip else None
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                param.copy_(master)
        return norm


def masters_of(optimizer):
    return [p for group in optimizer.param_groups for p in group["params"]]


def snapshot(*holders):
    """Return copies of all tensors in modules, optimizers' groups and states, tensors, lists and dicts."""
    found = []

    def visit(value):
        if isinstance(value, torch.Tensor):
            found.append(value.detach().clone())
        elif isinstance(value, nn.Module):
            visit(list(value.state_dict().values()))
        elif isinstance(value, torch.optim.Optimizer):
            visit(masters_of(value))
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
    return len(first) == len(second) and all(map(_same, first, second))


def _same(a, b):
    if not (isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)):
        return a == b
    if a.dtype != b.dtype or a.shape != b.shape or a.layout != b.layout:
        return False
    a, b = (t.coalesce().to_dense() if t.is_sparse else t for t in (a, b))
    return torch.equal(a.nan_to_num(nan=7e77), b.nan_to_num(nan=7e77))
