"""Cases of apex_compat.parallel for several gloo processes, which `worker.py` starts.

`run` runs all of them on each rank. `test_parallel.py` compares the results with one process that has everything.
"""

import copy
import warnings
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from apex_compat.parallel import (
    LARC,
    DistributedDataParallel,
    Reducer,
    SyncBatchNorm,
    convert_syncbn_model,
    create_syncbn_process_group,
)

DTYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def gradients_of(module):
    return {name: None if p.grad is None else p.grad.clone() for name, p in module.named_parameters()}


# --- what is done to a gradient ---

REDUCTIONS: dict[str, dict[str, Any]] = {
    "default": {},
    "delayed": {"delay_allreduce": True, "message_size": 1, "retain_allreduce_buffers": True},
    "streams": {"num_allreduce_streams": 2, "allreduce_trigger_params": [], "prof": True},
    "predivided": {"gradient_predivide_factor": 4.0},
    "summed": {"gradient_average": False},
    "predivided and summed": {"gradient_predivide_factor": 4.0, "gradient_average": False},
    "fp32": {"allreduce_always_fp32": True},
    "fp32 predivided": {"allreduce_always_fp32": True, "gradient_predivide_factor": 4.0},
}


def gradient(rank, dtype):
    """Return a gradient whose sums are exact in every dtype, but for the last one, which float16 cannot hold."""
    return torch.tensor([1.0, -3.0, 8.0 * rank, 7.0 - rank, 40960.0], dtype=dtype)


class Weights(nn.Module):
    """Parameters, each of which gets the gradient that the forward is given."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            setattr(self, name, nn.Parameter(value.clone()))

    def forward(self, **gradients):
        return {"loss": sum((getattr(self, name) * g).sum().float() for name, g in gradients.items())}


def reductions(rank, _):
    """The gradients for each set of arguments and each dtype."""
    found = {}
    for case, arguments in REDUCTIONS.items():
        module = Weights(**{name: torch.zeros(5, dtype=dtype) for name, dtype in DTYPES.items()})
        parallel = DistributedDataParallel(module, **arguments)
        parallel(**{name: gradient(rank, dtype) for name, dtype in DTYPES.items()})["loss"].backward()
        found[case] = gradients_of(module)
    return found


def unused(rank, world):
    """Gradients after three passes in which not every rank uses every parameter."""
    zeros = {f"of_{r}": torch.zeros(2) for r in range(world)}
    module = Weights(**zeros, of_nobody=torch.zeros(2, dtype=torch.float64))
    parallel = DistributedDataParallel(module)
    passes = [{f"of_{rank}": 6.0 * (rank + 1)}, {"of_0": 6.0 * rank}, {"of_0": 0.0} if rank else {"of_1": 6.0}]
    found = []
    for used in passes:
        parallel(**{name: torch.full((2,), value) for name, value in used.items()})["loss"].backward()
        found.append(gradients_of(module))
    return found


def reducers(rank, _):
    """What Reducer makes of a module and of gradients in lists."""
    module = Weights(a=torch.full((2,), float(rank)), b=torch.zeros(3, dtype=torch.float16), idle=torch.zeros(1))
    reducer = Reducer(module)
    module(a=torch.ones(2) * rank, b=torch.ones(3).half())["loss"].backward()
    reducer.reduce()
    loose = [torch.ones(2) * rank, {"x": (torch.ones(3, dtype=torch.float64) * rank,)}]
    Reducer(iter(loose)).reduce()
    return {"parameter": module.a.detach(), "gradients": gradients_of(module), "loose": loose}


class Scaled(nn.Module):
    """Returns its temperature too, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x):
        return x * self.scale, self.scale, x


def temperature(rank, _):
    """The gradient of a parameter that the module returns, and the hooks that it and an input have gathered."""
    module = Scaled()
    parallel = DistributedDataParallel(module)
    x = torch.full((), 6.0 * rank, requires_grad=True) * 1
    out, scale, _ = parallel(x)
    of_x = len(x._backward_hooks)
    with torch.no_grad():
        parallel(x)
    (out + scale).backward()
    return {
        "gradient": module.scale.grad,
        "hooks": [len(module.scale._backward_hooks or ()), len(x._backward_hooks) - of_x],
    }


# --- when it is done ---


class Network(nn.Module):
    """A network in float64 with a layer that is used twice, a frozen one, an unused one and a buffer."""

    def __init__(self, seed=0, reentrant=False):
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.twice, self.last, self.frozen, self.unused = (
            nn.Linear(4, 4, dtype=torch.float64) for _ in range(5)
        )
        self.frozen.requires_grad_(False)
        self.norm = nn.Identity()
        self.register_buffer("seed", torch.tensor(seed))
        self.reentrant = reentrant

    def forward(self, x):
        x = self.norm(self.first(x)).tanh()
        for _ in range(2):
            x = checkpoint(self.twice, x, use_reentrant=True) if self.reentrant else self.twice(x)
        return [{"out": self.last(self.frozen(x))}]


def batch(step):
    """Return inputs and targets of all ranks together, each (6, 4) in float64."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(2)]


def share(step, rank, world):
    """Return a rank's part of `batch(step)`."""
    return [part.chunk(world)[rank] for part in batch(step)]


def loss_of(model, data):
    x, y = data
    return (model(x)[0]["out"] - y).square().mean()


@contextmanager
def locally(model):
    """Keep the ranks from talking, if `model` does that."""
    if isinstance(model, DistributedDataParallel):
        model.disable_allreduce()
    yield
    if isinstance(model, DistributedDataParallel):
        model.enable_allreduce()


def accumulated(wrap, data, network=None):
    network = network or Network()
    model = wrap(network)
    with locally(model):
        loss_of(model, data(0)).backward()
    loss_of(model, data(1)).backward()
    return network


def several_forwards(wrap, data, network=None):
    network = network or Network()
    model = wrap(network)
    (loss_of(model, data(0)) + loss_of(model, data(1))).backward()
    return network


def checkpointed(wrap, data):
    return several_forwards(wrap, data, Network(reentrant=True))


def penalized(wrap, data):
    """A gradient penalty, whose first gradient must not start anything."""
    network = Network()
    model = wrap(network)
    for step in (0, 1):
        x, y = data(step)
        with locally(model) if step == 0 else locally(None):
            loss = loss_of(model, (x.requires_grad_(), y))
            (of_x,) = torch.autograd.grad(loss, x, create_graph=True)
            (loss + of_x.square().sum()).backward()
    return network


def failed(wrap, data):
    """A backward that fails half-way, before one that does not."""
    network = Network()
    model = wrap(network)

    def fail(_):
        raise ArithmeticError

    handle = network.first.weight.register_hook(fail)
    try:
        loss_of(model, data(2)).backward()
    except ArithmeticError:
        handle.remove()
        model.zero_grad()
    loss_of(model, data(0)).backward()
    return network


def copied(wrap, data):
    model = copy.deepcopy(wrap(Network()))
    loss_of(model, data(0)).backward()
    return getattr(model, "module", model)


def wrapped_again(wrap, data):
    network = Network()
    wrap(network)
    return accumulated(wrap, data, network)


def unfrozen(wrap, data):
    """Everything was frozen when the wrapper was made."""
    network = Network().requires_grad_(False)
    model = wrap(network)
    network.first.requires_grad_(True)
    loss_of(model, data(0)).backward()
    return network


WAYS = (
    accumulated,
    several_forwards,
    checkpointed,
    penalized,
    failed,
    copied,
    wrapped_again,
    unfrozen,
)
"""Ways to come to gradients: `wrap` of a network is trained with `data(step)`; the network is returned."""


def ways(rank, world):
    """The gradients of each way, summed over the ranks: what is summed twice shows."""

    def wrap(network):
        return DistributedDataParallel(network, gradient_average=False)

    return {way.__name__: gradients_of(way(wrap, lambda step: share(step, rank, world))) for way in WAYS}


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "larc": lambda params: LARC(torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)),
}


def normalized(seed):
    """Return a network with a batch norm."""
    network = Network(seed)
    network.norm = nn.BatchNorm1d(4, dtype=torch.float64)
    return network


def train(model, optimizer_of, data):
    """Train, and return the state."""
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    for step in range(4):
        optimizer.zero_grad()
        loss_of(model, data(step)).backward()
        optimizer.step()
    return model.state_dict()


def training(rank, world):
    """The states after training with synchronized batch norm, from another start on each rank."""
    return {
        name: train(
            DistributedDataParallel(convert_syncbn_model(normalized(rank))),
            optimizer_of,
            lambda step: share(step, rank, world),
        )
        for name, optimizer_of in OPTIMIZERS.items()
    }


# --- batch norm ---


class BatchNorm(NamedTuple):
    """A case of SyncBatchNorm."""

    shape: tuple[int, ...] = (4, 3, 5)
    """That of an input, without its first dimension."""
    arguments: dict[str, Any] = {}  # noqa: RUF012  nobody changes it
    rows: tuple[int, ...] = (4, 4, 4)
    """How many each rank has."""
    dtype: torch.dtype = torch.float64
    parameters: torch.dtype = torch.float64
    mean: float = 1.0
    adds: bool = False
    tolerance: float = 1e-12

    @property
    def channels(self):
        return self.shape[-1] if self.arguments.get("channel_last") else self.shape[0]

    def data(self, step, rank):
        """Return input, summand and gradient of the output."""
        generator = torch.Generator().manual_seed(10 * step + rank)
        shape = (self.rows[rank], *self.shape)
        return [
            torch.randn(*shape, generator=generator, dtype=torch.float64).add(mean).to(self.dtype)
            for mean in (self.mean, 0, 0)
        ]

    def affine(self, layer):
        """Give `layer` a weight and a bias that are not 1 and 0."""
        with torch.no_grad():
            for i, parameter in enumerate(layer.parameters()):
                parameter.copy_(torch.linspace(-1, 2, self.channels) + i)
        return layer


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
UNEQUAL = (1, 5, 2)
BATCH_NORMS = {
    "images": BatchNorm(),
    "rows": BatchNorm((4,)),
    "unequal": BatchNorm(rows=UNEQUAL),
    "empty": BatchNorm(rows=(0, 3, 2)),
    "channel last": BatchNorm((3, 5, 4), {"channel_last": True}, UNEQUAL),
    "relu": BatchNorm(arguments={"fuse_relu": True}),
    "sum": BatchNorm(adds=True),
    "sum and relu": BatchNorm((3, 5, 4), {"fuse_relu": True, "channel_last": True}, adds=True),
    "cumulative": BatchNorm(arguments={"momentum": None, "eps": 0.1}, rows=UNEQUAL),
    "plain": BatchNorm(arguments={"affine": False}),
    "untracked": BatchNorm(arguments={"track_running_stats": False}),
    "float": BatchNorm(dtype=F32, parameters=F32, tolerance=2e-6),
    "large mean": BatchNorm(dtype=F32, parameters=F32, mean=4096.0, rows=UNEQUAL, tolerance=1e-3),
    "half": BatchNorm(dtype=F16, parameters=F32, rows=UNEQUAL, mean=16.0, tolerance=1e-3),
    "bfloat16": BatchNorm(dtype=BF16, parameters=F32, mean=16.0, tolerance=8e-3),
    "all half": BatchNorm(dtype=F16, parameters=F16, tolerance=4e-3),
}


def batch_norm(case, rank, group=None):
    """Two training steps and an evaluation by rank 0 alone: everything that comes out."""
    layer = case.affine(SyncBatchNorm(case.channels, process_group=group, **case.arguments).to(case.parameters))
    steps = []
    for step in (0, 1):
        x, z, of_out = case.data(step, rank)
        layer.zero_grad()
        out = layer(x.requires_grad_(), z.requires_grad_()) if case.adds else layer(x.requires_grad_())
        out.backward(of_out)
        steps.append({"out": out.detach(), "x": x.grad, "z": z.grad, **gradients_of(layer)})
    evaluated = layer.eval()(case.data(2, 1)[0]) if rank == 0 else None
    return {"steps": steps, "state": layer.state_dict(), "evaluated": evaluated}


def batch_norms(rank, world):
    """Each case, and one case in groups of several sizes."""
    found = {name: batch_norm(case, rank) for name, case in BATCH_NORMS.items()}
    groups = {
        "first two": [dist.new_group([0, 1]), dist.new_group([world - 1])][rank // 2],
        "alone": create_syncbn_process_group(1),
        "everybody": create_syncbn_process_group(world),
        "default": create_syncbn_process_group(0),
    }
    return found | {name: batch_norm(BATCH_NORMS["unequal"], rank, group) for name, group in groups.items()}


def mistakes(*_):
    """The messages of what cannot be done."""

    def second_derivative():
        x = torch.ones(3, 2, requires_grad=True)
        torch.autograd.grad(SyncBatchNorm(2)(x).sum(), x, create_graph=True)

    def sparse():
        DistributedDataParallel(nn.Embedding(3, 2, sparse=True))(torch.tensor([1])).sum().backward()

    def group_size():
        create_syncbn_process_group(5)

    found = {}
    for mistake in (second_derivative, sparse, group_size):
        try:
            mistake()
        except (RuntimeError, TypeError, ValueError) as error:
            found[mistake.__name__] = f"{type(error).__name__}: {error}"
    return found


CASES = (reductions, unused, reducers, temperature, ways, training, batch_norms, mistakes)


def run(folder):
    """Run all cases on this rank, and write what they returned to `folder`/<ranks>-<rank>.pt."""
    warnings.simplefilter("error")
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.save({case.__name__: case(rank, world) for case in CASES}, f"{folder}/{world}-{rank}.pt")
    dist.destroy_process_group()
