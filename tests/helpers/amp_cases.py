"""Cases for apex_compat.amp: a fixture that leaves torch as it was, networks, batches and loops by hand."""

import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from apex_compat import amp
from fp16_cases import problem, same

INF, NAN = math.inf, math.nan
OWNERS = {"torch": torch, "F": F, "Tensor": Tensor, "rnn": nn.modules.rnn}


def torch_functions():
    """Return what torch, its functional module, its tensors and its recurrent layers hold, by owner and name."""
    return {
        (owner, name): getattr(module, name)
        for owner, module in OWNERS.items()
        for name in (dir(module) if isinstance(module, type) else vars(module))
        if getattr(module, name) is getattr(module, name)  # some are made anew at each access
        and name != "manual_seed"  # torch's compiler, which optimizers import, replaces it
    }


ORIGINAL = torch_functions()
STATE = dict(vars(amp._amp_state))


def changed():
    """Return the names that are not what they were when this module was imported."""
    return sorted(f"{owner}.{name}" for (owner, name), value in ORIGINAL.items() if now(owner, name) is not value)


def now(owner, name):
    return getattr(OWNERS[owner], name, None)


def deactivate():
    """Take O1's wrappers away, as scripts do, and forget what `initialize` was told."""
    handle = getattr(amp._amp_state, "handle", None)
    if handle is not None:
        handle._deactivate()
    amp.amp._registered.clear()  # registrations last, and there is no public way to take one back
    vars(amp._amp_state).clear()
    vars(amp._amp_state).update(STATE)


@pytest.fixture(autouse=True)
def torch_as_it_was() -> Iterator[None]:
    """Every test finds torch without wrappers and amp without state, and leaves them so."""
    fast = torch.backends.mha.get_fastpath_enabled()
    assert changed() == [], changed()
    yield
    deactivate()
    assert changed() == [], changed()
    assert torch.backends.mha.get_fastpath_enabled() == fast


def initialize(models, optimizers=None, opt_level="O1", verbosity=0, **kwargs):
    return amp.initialize(models, optimizers, opt_level=opt_level, verbosity=verbosity, **kwargs)


def o1(device="cpu", **kwargs):
    """Switch O1's casts on, for tensors on `device`."""
    model = nn.Linear(1, 1).to(device)
    return initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), **kwargs)


def backward(loss, optimizers, **kwargs):
    with amp.scale_loss(loss, optimizers, **kwargs) as scaled:
        scaled.backward()


class Net(nn.Module):
    """A convolution, BatchNorm and two linear layers: (8, 2, 6, 6) to (8, 3)."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(2, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.layers = nn.Sequential(nn.Linear(16, 6), nn.LayerNorm(6), nn.GELU(), nn.Linear(6, 3))

    def forward(self, x):
        x = F.max_pool2d(F.relu(self.norm(self.conv(x))), 2)
        return self.layers(x.flatten(1))


def mlp(seed=1):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def images(i, device="cpu"):
    """Return inputs (8, 2, 6, 6) and classes (8,) of batch i."""
    generator = torch.Generator().manual_seed(i)
    x = torch.randn(8, 2, 6, 6, generator=generator)
    return x.to(device), torch.randint(3, (8,), generator=generator).to(device)


OPTIMIZERS = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda params: torch.optim.Adam(params, lr=0.01),
}


def through_a_file(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


class ByHand:
    """Mixed precision in plain PyTorch: `cast` has made the model, masters are kept where `masters`.

    The scale is static, or dynamic from 2**16 where `scale` is "dynamic".
    """

    def __init__(self, model, optimizer, scale=1.0, masters=False):
        self.model = model
        self.params = list(model.parameters())
        self.masters = [
            p.detach().float().requires_grad_() if masters and p.dtype == torch.float16 else p for p in self.params
        ]
        self.optimizer = optimizer(self.masters)
        self.dynamic = scale == "dynamic"
        self.scale = 2.0**16 if self.dynamic else scale

    def step(self, loss):
        self.model.zero_grad()
        (loss.float() * self.scale).backward()
        for param, master in zip(self.params, self.masters, strict=True):
            grad = param.grad
            # In place where the dtypes agree; a master's gradient is made in fp32.
            master.grad = grad.mul_(1 / self.scale) if master is param else grad.float() * (1 / self.scale)
        if self.dynamic and not all(bool(m.grad.isfinite().all()) for m in self.masters):
            self.scale /= 2
            return
        self.optimizer.step()
        with torch.no_grad():
            for param, master in zip(self.params, self.masters, strict=True):
                if master is not param:
                    param.copy_(master)


def equal_states(first, second):
    """Say whether two modules hold the same bits, whatever their `state_dict` does to them."""

    def tensors(module):
        return [*module.parameters(), *module.buffers()]

    return same([t.detach() for t in tensors(first)], [t.detach() for t in tensors(second)])


class Casts(dict):
    """Casts each weight to half once; gradients of several uses are then summed in half."""

    def __missing__(self, weight):
        self[weight] = weight.half()
        return self[weight]

    def __call__(self, *weights):
        return [self[weight] for weight in weights]


class Copy(NamedTuple):
    """A network for O1, and the same network with every cast written out."""

    network: Callable
    by_hand: Callable
    batch: Callable


class Residual(nn.Module):
    """Uses one layer twice; adds, multiplies and concatenates what has two dtypes."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(2)
        self.first, self.twice, self.last = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(15, 3)
        self.norm = nn.LayerNorm(5)
        self.slope = nn.PReLU()

    def forward(self, x):
        a = F.gelu(self.norm(self.first(x)))
        b = self.slope(self.twice(self.twice(a))) + a
        c = torch.mul(b, self.twice(a)).softmax(-1)
        return self.last(torch.cat([a, b, c], 1))


def residual_by_hand(net, x):
    casts = Casts()

    def linear(layer, value):
        return F.linear(value.half(), *casts(layer.weight, layer.bias))

    a = F.gelu(net.norm(linear(net.first, x).float()))
    b = torch.prelu(linear(net.twice, linear(net.twice, a)), casts[net.slope.weight]).float() + a
    c = (b * linear(net.twice, a).float()).softmax(-1)
    return linear(net.last, torch.cat([a, b, c], 1))


def net_by_hand(net, x):
    casts = Casts()
    x = net.norm(F.conv2d(x.half(), *casts(net.conv.weight, net.conv.bias)))
    x = F.max_pool2d(F.relu(x), 2).flatten(1)
    first, norm, _, last = net.layers
    x = norm(F.linear(x, *casts(first.weight, first.bias)).float())
    return F.linear(F.gelu(x).half(), *casts(last.weight, last.bias))


class Attention(nn.Module):
    """Attends with torch's module, whose Python calls linear, bmm and softmax itself: (5, 2, 4) to (10, 3)."""

    def __init__(self, weights=True):
        super().__init__()
        torch.manual_seed(3)
        self.weights = weights
        self.attention = nn.MultiheadAttention(4, 2)
        self.last = nn.Linear(4, 3)

    def forward(self, x):
        out, weights = self.attention(x, x, x, need_weights=self.weights)
        return self.last(out).flatten(0, 1), weights


def attention_by_hand(net, x):
    casts, module = Casts(), net.attention
    length, batch, width = x.shape

    def heads(value):
        return value.contiguous().view(length, batch * 2, width // 2).transpose(0, 1)

    packed = F.linear(x.half(), *casts(module.in_proj_weight, module.in_proj_bias))
    q, k, v = packed.unflatten(-1, (3, width)).unsqueeze(0).transpose(0, -2).squeeze(-2).contiguous()
    q, k, v = heads(q), heads(k), heads(v)
    if net.weights:
        weights = F.softmax(torch.bmm(q * math.sqrt(2.0 / width), k.transpose(-2, -1)).float(), dim=-1)
        out = torch.bmm(weights.half(), v).transpose(0, 1).contiguous()
    else:
        shape = (batch, 2, length, width // 2)
        out = F.scaled_dot_product_attention(q.view(shape), k.view(shape), v.view(shape))
        out = out.permute(2, 0, 1, 3).contiguous()
    out = F.linear(out.view(length * batch, width), *casts(module.out_proj.weight, module.out_proj.bias))
    return F.linear(out, *casts(net.last.weight, net.last.bias))


class Recurrent(nn.Module):
    """A recurrent layer, its cell and a linear layer: (6, 5, 4) to (5, 3)."""

    def __init__(self, layer="LSTM", **kwargs):
        super().__init__()
        torch.manual_seed(4)
        self.layer = getattr(nn, layer)(4, 5, **kwargs)
        width = 10 if kwargs.get("bidirectional") else 5
        cell = {"LSTM": nn.LSTMCell, "GRU": nn.GRUCell}.get(layer)
        self.cell = nn.RNNCell(width, 5, nonlinearity=self.layer.nonlinearity) if cell is None else cell(width, 5)
        self.last = nn.Linear(5, 3)

    def forward(self, x):
        out, _ = self.layer(x)
        state = None
        for row in (out[-2], out[-1]):  # the cell's weights are used twice
            state = self.cell(row, state)
        return self.last(state[0] if isinstance(state, tuple) else state)


def recurrent_by_hand(net, x):
    layer, cell, casts = net.layer, net.cell, Casts()
    hidden = torch.zeros(layer.num_layers * (2 if layer.bidirectional else 1), x.shape[1], 5, device=x.device).half()
    lstm = layer.mode == "LSTM"
    function = getattr(torch._VF, layer.mode.lower())
    weights = [weight.half() for weight in layer._flat_weights]  # O1 does not cache these
    first = (hidden, hidden) if lstm else hidden
    out = function(x.half(), first, weights, True, layer.num_layers, 0.0, True, layer.bidirectional, False)[0]
    step = getattr(torch._VF, f"{layer.mode.lower()}_cell")
    zeros = torch.zeros(x.shape[1], 5, device=x.device).half()
    state = (zeros, zeros) if lstm else zeros
    for row in (out[-2], out[-1]):
        state = step(row, state, *casts(cell.weight_ih, cell.weight_hh, cell.bias_ih, cell.bias_hh))
    return F.linear(state[0] if lstm else state, *casts(net.last.weight, net.last.bias))


def rows(i, device="cpu"):
    return problem(i)[0].to(device), torch.arange(8, device=device) % 3


def sequences(length, batch, classes):
    def make(i, device="cpu"):
        generator = torch.Generator().manual_seed(i)
        x = torch.randn(length, batch, 4, generator=generator)
        return x.to(device), torch.arange(classes, device=device) % 3

    return make


COPIES = {
    "convolution": Copy(Net, net_by_hand, images),
    "residual": Copy(Residual, residual_by_hand, rows),
    "attention": Copy(Attention, attention_by_hand, sequences(5, 2, 10)),
    "attention, no weights": Copy(lambda: Attention(False), attention_by_hand, sequences(5, 2, 10)),
    "LSTM": Copy(lambda: Recurrent(num_layers=2), recurrent_by_hand, sequences(6, 5, 5)),
    "GRU": Copy(lambda: Recurrent("GRU", bidirectional=True), recurrent_by_hand, sequences(6, 5, 5)),
    "RNN": Copy(lambda: Recurrent("RNN"), recurrent_by_hand, sequences(6, 5, 5)),
    "RNN, relu": Copy(lambda: Recurrent("RNN", nonlinearity="relu"), recurrent_by_hand, sequences(6, 5, 5)),
}


def half_copy(model, keep_batchnorm):
    """Return a copy in half; the affine BatchNorm layers stay in fp32 if `keep_batchnorm`."""
    model = copy.deepcopy(model).half()
    for module in model.modules():
        if keep_batchnorm and isinstance(module, nn.modules.batchnorm._BatchNorm) and module.affine:
            module.float()
    return model
