"""What O1 casts: every name of its lists, in every way to call it, gives the dtype and the bits of a cast by hand."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from amp_cases import (  # noqa: F401
    OPTIMIZERS,
    ORIGINAL,
    OWNERS,
    amp,
    backward,
    changed,
    initialize,
    mlp,
    now,
    o1,
    torch_as_it_was,
)
from amp_table import BY_NAME, IN_PLACE, TABLE, arguments, is_floating, with_dtypes
from fp16_cases import same

HALF, FLOAT, DOUBLE, BF16 = torch.float16, torch.float32, torch.float64, torch.bfloat16
MIXES = {
    "half": [HALF],
    "float": [FLOAT],
    "half, float": [HALF, FLOAT],
    "float, half": [FLOAT, HALF],
    "double": [DOUBLE],
    "double, half": [DOUBLE, HALF],
    "bfloat16": [BF16],
    "bfloat16, float": [BF16, FLOAT],
}


def widest(dtypes):
    """Return the dtype that promotion casts to, or None: other dtypes are torch's affair."""
    if set(dtypes) <= {HALF, FLOAT}:
        return FLOAT if FLOAT in dtypes else HALF
    return None


def target(rule, given):
    """Return the dtype that `rule` casts floating arguments to, or None."""
    dtypes = [value.dtype for value in given if is_floating(value)]
    return {"half": HALF, "promote": widest(dtypes), "nothing": None}.get(rule, FLOAT)


def cast(value, dtype):
    return value.to(dtype) if dtype is not None and is_floating(value) else value


def outcome(function, *args, **kwargs):
    """Return what a call gives, as a value that can be compared: a tensor, or the type of its exception."""
    args = [value.clone() if isinstance(value, Tensor) else value for value in args]
    kwargs = {key: value.clone() if isinstance(value, Tensor) else value for key, value in kwargs.items()}
    try:
        value = function(*args, **kwargs)
    except (RuntimeError, NotImplementedError, TypeError) as error:
        return type(error)
    return value


def cases(table):
    return [pytest.param(rule, owner, id=f"{rule} {owner}") for rule, owners in table.items() for owner in owners]


def split(given, positional):
    """Return the first `positional` of the arguments, and the rest by name."""
    items = list(given.items())
    args = [value for name, value in items[:positional] if name not in BY_NAME]
    return args, dict(items[len(args) :])


@pytest.mark.parametrize(("rule", "owner"), cases({k: v for k, v in TABLE.items() if k != "sequence"}))
def test_every_name_gives_what_a_cast_by_hand_gives(rule, owner, device):
    listed, wrong = TABLE[rule][owner], []
    calls = []
    for name in listed:
        for mix, dtypes in MIXES.items():
            if rule == "reciprocal" and widest(dtypes) is None:
                continue
            given = with_dtypes(arguments(name, device), dtypes)
            dtype = target(rule, given.values())
            by_hand = [cast(value, dtype) for value in given.values()]
            args, kwargs = split(dict(zip(given, by_hand, strict=True)), len(given))
            calls.append((name, mix, given, outcome(ORIGINAL[owner, name], *args, **kwargs)))
    o1(device)
    for name, mix, given, expected in calls:
        ways = {"positional": len(given)}
        if not name.startswith("__") and name != "cpu":
            ways["keyword"] = 1 if owner == "Tensor" else 0
        for way, positional in ways.items():
            args, kwargs = split(given, positional)
            value = outcome(now(owner, name), *args, **kwargs)
            if not same([value], [expected]):
                wrong.append((name, mix, way, brief(value), "expected", brief(expected)))
    assert wrong == []


def brief(value):
    return value.dtype if isinstance(value, Tensor) else value


@pytest.mark.parametrize(
    ("name", "dtypes", "dtype"),
    [
        ("linear", (FLOAT, FLOAT), HALF),
        ("softmax", (HALF,), FLOAT),
        ("mse_loss", (HALF, HALF), FLOAT),
        ("layer_norm", (HALF, FLOAT), FLOAT),
        ("__add__", (HALF, FLOAT), FLOAT),
        ("__add__", (HALF, HALF), HALF),
        ("sum", (HALF,), FLOAT),
        ("__matmul__", (FLOAT, HALF), HALF),
    ],
)
def test_dtypes_of_a_few_calls(name, dtypes, dtype):
    o1()
    owner = "Tensor" if hasattr(Tensor, name) and name != "softmax" else "F"
    assert now(owner, name)(*with_dtypes(arguments(name, "cpu"), dtypes).values()).dtype == dtype


@pytest.mark.parametrize(("rule", "owner"), cases(IN_PLACE))
def test_functions_in_place(rule, owner, device):
    wrong = []
    o1(device)
    for name in IN_PLACE[rule][owner]:
        for mix in ("half", "float", "half, float", "float, half"):
            given = with_dtypes(arguments(name, device), MIXES[mix])
            first, *others = given.values()
            looked_at = [first] if owner == "Tensor" else list(given.values())
            if rule == "banned" and any(is_floating(v) and v.dtype == HALF for v in looked_at):
                with pytest.raises(NotImplementedError, match=f"(?s)in-place.*{name}"):
                    now(owner, name)(*given.values())
                continue
            expected = first.clone()
            by_hand = [cast(value, expected.dtype) for value in others]
            expected = outcome(ORIGINAL[owner, name], expected, *by_hand)
            value = outcome(now(owner, name), first, *others)
            if not same([value], [expected]):
                wrong.append((name, mix, brief(value), "expected", brief(expected)))
    assert wrong == []


@pytest.mark.parametrize("name", ["cat", "stack"])
@pytest.mark.parametrize("way", ["list", "tuple", "keyword"])
def test_sequences_are_promoted(name, way, device):
    o1(device)
    for mix, expected in {"half": HALF, "float": FLOAT, "half, float": FLOAT, "float, half": FLOAT}.items():
        given = list(with_dtypes(arguments("mul", device), MIXES[mix]).values())
        given = tuple(given) if way == "tuple" else given
        function = getattr(torch, name)
        value = function(tensors=given, dim=1) if way == "keyword" else function(given, 1)
        assert value.dtype == expected, mix
        assert same([value], [ORIGINAL["torch", name]([t.to(expected) for t in given], 1)])


def test_operators_in_place_bind_a_new_tensor():
    o1()
    a = before = torch.ones(3, dtype=HALF)
    a += torch.full((3,), 0.5)
    assert a is not before
    assert same([a, before], [torch.full((3,), 1.5), torch.ones(3, dtype=HALF)])
    b = before_b = torch.ones(3)
    b += torch.full((3,), 0.5, dtype=HALF)
    assert b is before_b
    assert same([b], [torch.full((3,), 1.5)])
    c = before
    c.add_(torch.full((3,), 0.5))
    assert same([before], [torch.full((3,), 1.5, dtype=HALF)])


def test_zero_dimensional_tensors_count():
    half, scalar = torch.ones(3, dtype=HALF), torch.tensor(2.0)
    assert (half * scalar).dtype == HALF
    o1()
    assert (half * scalar).dtype == FLOAT
    assert (half * 2.0).dtype == HALF


def test_comparisons_are_made_in_the_widest_dtype():
    o1()
    a, b = torch.full((1,), 1.0, dtype=HALF), torch.full((1,), 1.0001)
    assert not torch.equal(a, b)
    assert not (a == b).item()
    assert (a < b).item()


def test_integers_stay():
    o1()
    whole = torch.arange(6).view(2, 3)
    assert whole.sum().dtype == torch.int64
    assert (whole @ whole.T).dtype == torch.int64
    assert (whole + 1).dtype == torch.int64
    assert torch.cat([whole, whole]).dtype == torch.int64
    assert torch.exp(torch.ones(2)).dtype == FLOAT


def test_layers_without_a_rule_keep_their_type(device):
    half = torch.randn(4, 3, 5).to(device, HALF)
    layers = nn.ModuleList([nn.BatchNorm1d(3), nn.InstanceNorm1d(3), nn.Dropout(0.5), nn.ReLU(), nn.AvgPool1d(2)])
    layers.to(device)
    o1(device)
    for layer in layers:
        assert layer(half).dtype == HALF, layer
    assert half.softmax(0).dtype == HALF
    assert F.softmax(half, dim=0).dtype == FLOAT
    single = torch.randn(3, 3, device=device)
    assert torch.einsum("ij,jk->ik", single, single).dtype == FLOAT
    assert F.embedding(torch.tensor([0, 2], device=device), single).dtype == FLOAT


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM, nn.RNNCell, nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("dtype", [HALF, FLOAT])
def test_recurrent_layers_run_in_half(layer, dtype, device):
    network, x = layer(4, 5).to(device), torch.randn(6, 4, device=device)
    copy = layer(4, 5).to(device, HALF)
    copy.load_state_dict(network.state_dict())
    expected = copy(x.half())
    o1(device)
    found = network(x.to(dtype))
    assert same(flat(found), flat(expected))
    assert all(t.dtype == HALF for t in flat(found))
    assert all(p.dtype == FLOAT for p in network.parameters())


def flat(value):
    return [value] if isinstance(value, Tensor) else [t for item in value for t in flat(item)]


BCE = {"input": (2, 3), "target": (2, 3)}


@pytest.mark.parametrize("dtypes", [(HALF,), (HALF, FLOAT), (FLOAT, HALF)])
def test_binary_cross_entropy_is_banned_for_half(dtypes):
    given = with_dtypes({key: torch.full(shape, 0.5) for key, shape in BCE.items()}, dtypes)
    given = {key: value.clamp(max=1.0) for key, value in given.items()}
    o1()
    with pytest.raises(NotImplementedError, match="binary_cross_entropy_with_logits"):
        F.binary_cross_entropy(*given.values())
    with pytest.raises(NotImplementedError, match="binary_cross_entropy_with_logits"):
        F.binary_cross_entropy(**given)
    assert F.binary_cross_entropy(torch.full((2,), 0.5), torch.ones(2)).dtype == FLOAT


def test_binary_cross_entropy_may_be_allowed():
    x, y = torch.full((2,), 0.5, dtype=HALF), torch.ones(2, dtype=HALF)
    amp.init(allow_banned=True)
    value = F.binary_cross_entropy(x, y)
    assert same([value], [ORIGINAL["F", "binary_cross_entropy"](x.float(), y.float())])


def first_of(x, *more, **kwargs):
    """Return the dtypes that arrive, nested as they came."""
    if isinstance(x, list | tuple):
        return type(x)(first_of(item) for item in x)
    return x.dtype if isinstance(x, Tensor) else x


class TestUserFunctions:
    """Functions of a user's own, decorated or registered."""

    DECORATORS = ((amp.half_function, HALF), (amp.float_function, FLOAT))

    @pytest.mark.parametrize(("decorate", "dtype"), DECORATORS)
    def test_a_decorated_function_casts_while_o1_is_on(self, decorate, dtype):
        function = decorate(first_of)
        assert function.__name__ == "first_of"
        given = [torch.ones(1, dtype=d) for d in (HALF, FLOAT, DOUBLE)]
        assert function(given) == [HALF, FLOAT, DOUBLE]  # before initialize it does nothing
        o1()
        assert function(given) == [dtype] * 3
        assert function((given[0], [given[1], (given[2],)], "text", None)) == (dtype, [dtype, (dtype,)], "text", None)
        assert function(torch.arange(3)) == torch.int64
        with amp.disable_casts():
            assert function(given) == [HALF, FLOAT, DOUBLE]

    def test_a_promoting_function(self):
        @amp.promote_function
        def dtypes(*args, **kwargs):
            return [value.dtype for value in (*args, *kwargs.values())]

        half, single = torch.ones(1, dtype=HALF), torch.ones(1)
        assert dtypes(half, single) == [HALF, FLOAT]
        o1()
        assert dtypes(half, single) == [FLOAT, FLOAT]
        assert dtypes(half, other=single) == [FLOAT, FLOAT]
        assert dtypes(half, half) == [HALF, HALF]

    @pytest.mark.parametrize(
        ("register", "dtypes"),
        [
            (amp.register_half_function, [HALF, HALF]),
            (amp.register_float_function, [FLOAT, FLOAT]),
            (amp.register_promote_function, [FLOAT, FLOAT]),
        ],
    )
    def test_a_registered_function(self, register, dtypes):
        class Module:
            @staticmethod
            def function(*args):
                return [value.dtype for value in args]

        original = Module.function
        register(Module, "function")
        given = torch.ones(1, dtype=HALF), torch.ones(1)
        assert Module.function(*given) == [HALF, FLOAT]
        o1()
        assert Module.function(*given) == dtypes
        amp._amp_state.handle._deactivate()
        assert Module.function is original
        with pytest.raises(ValueError, match="nothing"):
            register(Module, "nothing")

    def test_a_function_of_torch_may_be_registered(self):
        amp.register_float_function(torch, "sigmoid")
        o1()
        assert torch.sigmoid(torch.ones(2, dtype=HALF)).dtype == FLOAT
        o1()  # a second initialize keeps it
        assert torch.sigmoid(torch.ones(2, dtype=HALF)).dtype == FLOAT
        amp._amp_state.handle._deactivate()
        assert changed() == []

    def test_a_registration_stands_inside_the_list(self):
        a, b = torch.full((1, 1), 1.0001), torch.ones(1, 1)
        amp.register_float_function(torch, "matmul")
        o1()
        assert same([torch.matmul(a, b)], [torch.ones(1, 1)])  # rounded to half first
        assert (a @ b).dtype == HALF


def test_casts_may_be_disabled():
    x = torch.ones(2, 2)
    o1()
    assert (x @ x).dtype == HALF
    with amp.disable_casts():
        assert (x @ x).dtype == FLOAT
        assert F.softmax(x.half(), dim=0).dtype == HALF
    assert (x @ x).dtype == HALF


def test_casts_are_printed_at_verbosity_2(capsys):
    o1(verbosity=2)
    capsys.readouterr()
    layer, x = nn.Linear(2, 2), torch.ones(1, 2)
    F.softmax(layer(x), dim=1)
    lines = capsys.readouterr().out.splitlines()
    assert lines.count("Float->Half (linear)") == 3
    assert lines.count("Half->Float (softmax)") == 1


def test_the_optimizer_steps_without_casts():
    network, twin = mlp(), mlp()
    x = torch.randn(3, 4)
    optimizers = [OPTIMIZERS["adam"](net.parameters()) for net in (network, twin)]
    network, first = initialize(network, optimizers[0], loss_scale=128.0)
    backward(network(x).float().sum(), first)
    for param, other in zip(network.parameters(), twin.parameters(), strict=True):
        other.grad = param.grad.clone()
    with amp.disable_casts():
        optimizers[1].step()
    first.step()
    assert same([p.detach() for p in network.parameters()], [p.detach() for p in twin.parameters()])


def test_a_closure_passes_in_o1_and_runs_uncast():
    network = mlp()
    network, optimizer = initialize(network, OPTIMIZERS["sgd"](network.parameters()))
    seen = []

    def closure():
        out = network(torch.ones(2, 4))
        seen.append(out.dtype)
        loss = out.sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() != 0
    assert seen == [FLOAT]


class TestCache:
    """Cast weights are kept within an iteration, and never used when they are stale."""

    def test_an_evaluation_first_leaves_gradients_alone(self):
        network = mlp()
        network, optimizer = initialize(network, OPTIMIZERS["sgd"](network.parameters()))
        with torch.no_grad():
            network(torch.ones(2, 4))
        backward(network(torch.ones(2, 4)).float().sum(), optimizer)
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network[2].parameters())

    @pytest.mark.parametrize(
        "change",
        [
            lambda net: net.load_state_dict({k: v * 2 for k, v in net.state_dict().items()}),
            lambda net: [p.mul_(2) for p in net.parameters()],
        ],
        ids=["load_state_dict", "in place"],
    )
    @pytest.mark.parametrize("grad", [False, True])
    def test_a_changed_weight_is_cast_anew(self, change, grad):
        layer = nn.Linear(2, 1, bias=False)
        nn.init.ones_(layer.weight)
        o1()
        x = torch.ones(1, 2)
        with torch.set_grad_enabled(grad):
            assert layer(x).item() == 2.0
            with torch.no_grad():
                change(layer)
            assert layer(x).item() == 4.0

    def test_a_frozen_weight_that_is_unfrozen(self):
        layer = nn.Linear(2, 1, bias=False).requires_grad_(False)
        o1()
        layer(torch.ones(1, 2))
        layer.requires_grad_(True)
        layer(torch.ones(1, 2)).sum().backward()
        assert layer.weight.grad is not None


def test_attention_is_cast_in_evaluation_too():
    """There torch has a kernel for whole layers, past all functions that could cast."""
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    attention, x = nn.MultiheadAttention(4, 2, batch_first=True).eval(), torch.randn(2, 3, 4)
    o1()
    with torch.no_grad():
        assert attention(x, x, x, need_weights=False)[0].dtype == HALF
        assert not torch.equal(layer(x), uncast(layer, x))


def uncast(layer, x):
    with amp.disable_casts():
        return layer(x)


def test_owners_hold_what_the_table_names():
    for owners in TABLE.values():
        for owner, listed in owners.items():
            assert all(hasattr(OWNERS[owner], name) for name in listed)
