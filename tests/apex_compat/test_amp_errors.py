"""What apex_compat.amp refuses, accepts, prints and returns."""

import re
from collections import OrderedDict, namedtuple

import numpy as np
import pytest
import torch
from torch import nn

from amp_cases import OPTIMIZERS, amp, backward, initialize, mlp, torch_as_it_was  # noqa: F401
from apex_compat import fp16_utils

LEVELS = ["O0", "O1", "O2", "O3"]
each_level = pytest.mark.parametrize("level", LEVELS)

LETTER = "(?s)optimization level.*O0.*O1.*O2.*O3.*letter O"
INSERTS = r"(?s)O1 inserts casts around Torch functions rather than model weights.*cast_model_type was torch\.float"
SELECT = "should only be set by selecting.*O1"
BATCHNORM = "(?s)With.*O1, batchnorm functions are automatically patched.*should be None"
MASTERS = "(?s)doesn't make sense to use master_weights with O1"

OVERRIDES = [
    *(({"opt_level": level}, RuntimeError, LETTER) for level in ("01", "o1", "O4", 1)),
    ({"opt_level": "O1", "cast_model_type": torch.float16}, RuntimeError, INSERTS),
    ({"opt_level": "O1", "cast_model_type": torch.float64}, RuntimeError, INSERTS),
    *(({"opt_level": level, "patch_torch_functions": True}, RuntimeError, SELECT) for level in ("O0", "O2", "O3")),
    *(({"opt_level": "O1", "keep_batchnorm_fp32": v}, RuntimeError, BATCHNORM) for v in (True, False, "False")),
    *(({"opt_level": level, "keep_batchnorm_fp32": "yes"}, AssertionError, "") for level in ("O0", "O2", "O3")),
    *(({"opt_level": "O1", "master_weights": value}, RuntimeError, MASTERS) for value in (True, False)),
    *(({"opt_level": level, "loss_scale": "high"}, ValueError, "high") for level in LEVELS),
]


@pytest.mark.parametrize(("kwargs", "error", "said"), OVERRIDES, ids=[str(row[0]) for row in OVERRIDES])
def test_an_override_is_refused(kwargs, error, said):
    network = mlp()
    with pytest.raises(error, match=re.compile(said, re.IGNORECASE)):
        initialize(network, OPTIMIZERS["sgd"](network.parameters()), **kwargs)


ACCEPTED = [
    ("O1", "cast_model_type", False, False),
    ("O1", "cast_model_type", torch.float32, torch.float32),
    ("O1", "patch_torch_functions", True, True),
    ("O2", "patch_torch_functions", False, False),
    ("O2", "keep_batchnorm_fp32", "True", True),
    ("O2", "keep_batchnorm_fp32", "False", False),
    ("O3", "keep_batchnorm_fp32", True, True),
    ("O3", "master_weights", True, True),
    ("O0", "loss_scale", "dynamic", "dynamic"),
    ("O2", "cast_model_type", torch.bfloat16, torch.bfloat16),
    ("O2", "master_weights", False, False),
    ("O2", "loss_scale", 0, 0.0),
    ("O2", "loss_scale", "128.0", 128.0),
    ("O1", "loss_scale", 64, 64.0),
]


@pytest.mark.parametrize(("level", "name", "given", "kept"), ACCEPTED)
def test_an_override_is_accepted(level, name, given, kept):
    network = mlp()
    initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, **{name: given})
    options = amp._amp_state.opt_properties.options
    assert options[name] == kept
    assert type(options[name]) is type(kept)
    assert getattr(amp._amp_state.opt_properties, name) == kept


@pytest.mark.parametrize("kwargs", [kwargs for kwargs, error, _ in OVERRIDES[4:] if error is RuntimeError], ids=str)
def test_hard_override_makes_it_a_warning(kwargs, capsys):
    network = mlp()
    amp._amp_state.hard_override = True
    initialize(network, OPTIMIZERS["sgd"](network.parameters()), **kwargs, verbosity=1)
    assert "Warning:  " in capsys.readouterr().out


PROPERTIES = {
    "O0": [True, "O0", torch.float32, False, None, False, 1.0],
    "O1": [True, "O1", None, True, None, None, "dynamic"],
    "O2": [True, "O2", torch.float16, False, True, True, "dynamic"],
    "O3": [True, "O3", torch.float16, False, False, False, 1.0],
}
NAMES = ["enabled", "opt_level", "cast_model_type", "patch_torch_functions", "keep_batchnorm_fp32"]
NAMES += ["master_weights", "loss_scale"]


@each_level
def test_what_is_printed(level, capsys):
    network = mlp()
    initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, loss_scale=128.0, verbosity=1)
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"Selected optimization level {level}: .*\.", first)
    defaults = [f"{name:22} : {value}" for name, value in zip(NAMES, PROPERTIES[level], strict=True)]
    assert lines == [
        *([] if level == "O3" else [""]),
        "Defaults for this optimization level are:",
        *defaults,
        "Processing user overrides (additional kwargs that are not None)...",
        "After processing overrides, optimization options are:",
        *defaults[:-1],
        "loss_scale             : 128.0",
    ]


@each_level
def test_options_of_a_level(level):
    network = mlp()
    initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level)
    assert amp._amp_state.opt_properties.options == dict(zip(NAMES, PROPERTIES[level], strict=True))


@each_level
@pytest.mark.parametrize("verbosity", [0, False])
def test_silence(level, verbosity, capsys):
    network = mlp()
    initialize(network, OPTIMIZERS["sgd"](network.parameters()), opt_level=level, verbosity=verbosity)
    assert capsys.readouterr().out == ""


def with_buffer(dtype):
    network = mlp()
    network.register_buffer("extra", torch.ones(1, dtype=dtype))
    return network


def sgd(network):
    return OPTIMIZERS["sgd"](network.parameters())


REFUSED = {
    "optimizers of a wrong type": (lambda: initialize(mlp(), 1), TypeError, "optimizers must be either a single"),
    "models of a wrong type": (lambda: initialize("model", sgd(mlp())), TypeError, "models must be either a single"),
    "FP16_Optimizer": (
        lambda: initialize(mlp(), fp16_utils.FP16_Optimizer(sgd(mlp().half()), verbose=False)),
        RuntimeError,
        "FP16_Optimizer",
    ),
    "a list with FP16_Optimizer": (
        lambda: initialize(mlp(), [fp16_utils.FP16_Optimizer(sgd(mlp().half()), verbose=False)]),
        RuntimeError,
        "FP16_Optimizer",
    ),
    "DataParallel": (lambda: initialize(nn.DataParallel(mlp())), RuntimeError, "should only be applied AFTER"),
    "a half parameter": (lambda: initialize(mlp().half()), RuntimeError, r"do not need to call \.half\(\)"),
    "a half buffer": (lambda: initialize(with_buffer(torch.float16)), RuntimeError, r"do not need to call \.half\(\)"),
}


@pytest.mark.parametrize(("call", "error", "said"), REFUSED.values(), ids=list(REFUSED))
def test_initialize_refuses(call, error, said):
    with pytest.raises(error, match=said):
        call()


def twice():
    network = mlp()
    optimizer = sgd(network)
    return initialize(network, [optimizer, optimizer], opt_level="O2")


FAILURES = [
    *((lambda kwargs=kwargs: initialize(mlp(), sgd(mlp()), **kwargs), error) for kwargs, error, _ in OVERRIDES),
    *((call, error) for call, error, _ in REFUSED.values()),
    (twice, RuntimeError),
    (lambda: initialize(mlp(), min_loss_scale=2.0, max_loss_scale=1.0), ValueError),
    (lambda: initialize(mlp(), num_losses="2"), TypeError),
    (lambda: initialize(mlp(), opt_level="O2", cast_model_type=torch.int32), TypeError),
]


def test_an_initialize_that_fails_leaves_everything_as_it_was():
    others = [mlp(), mlp()]
    initialized = initialize(*(network := mlp(), sgd(network)), loss_scale=128.0, verbosity=1)
    before = dict(vars(amp._amp_state))
    calls = [*FAILURES, (lambda: initialize(others, [sgd(mlp()), initialized[1]], opt_level="O2"), RuntimeError)]
    for call, error in calls:
        with pytest.raises(error):
            call()
        assert vars(amp._amp_state) == before
        assert amp._amp_state.handle.is_active()
    assert {p.dtype for other in others for p in other.parameters()} == {torch.float32}
    model, optimizer = initialized
    with amp.scale_loss(model(torch.ones(1, 4)).sum(), optimizer) as scaled:
        assert scaled.item() == pytest.approx(128 * model(torch.ones(1, 4)).sum().item(), rel=1e-2)


def test_a_first_initialize_that_fails_is_none(capsys):
    with pytest.raises(RuntimeError, match="FP16_Optimizer"):
        REFUSED["FP16_Optimizer"][0]()
    test_scale_loss_needs_initialize()
    initialize(mlp(), num_losses=0)
    with pytest.raises(RuntimeError, match=r"^loss_id is 0; amp\.initialize had num_losses=0, which allows none$"):
        backward(torch.ones(()), [])


@each_level
def test_an_optimizer_passes_once(level):
    network = mlp()
    optimizer = sgd(network)
    initialize(network, optimizer, opt_level=level)
    with pytest.raises(RuntimeError, match=r"should only be passed through amp\.initialize once"):
        initialize(mlp(), optimizer, opt_level=level)


@pytest.mark.parametrize("level", ["O0", "O1", "O2"])
def test_a_half_model_may_come_in_if_asked(level):
    amp._amp_state.allow_incoming_model_not_fp32 = True
    network = mlp().half()
    initialize(network, sgd(network), opt_level=level)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_pass(dtype):
    initialize(with_buffer(dtype), opt_level="O1")


def test_scale_loss_needs_initialize():
    network = mlp()
    loss = network(torch.ones(1, 4)).sum()
    with (
        pytest.raises(RuntimeError, match="internal Amp state has not been initialized"),
        amp.scale_loss(loss, sgd(network)),
    ):
        pass


def test_a_closure_is_refused_with_masters():
    network = mlp()
    network, optimizer = initialize(network, sgd(network), opt_level="O2")
    backward(network(torch.ones(1, 4)).sum(), optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: None)


@pytest.mark.parametrize("level", ["O0", "O1", "O3"])
def test_a_closure_is_refused_where_a_step_is_skipped(level):
    network = mlp()
    network, optimizer = initialize(network, sgd(network), opt_level=level, loss_scale="dynamic")
    backward(network(torch.ones(1, 4)).sum() * float("inf"), optimizer)
    with pytest.raises(RuntimeError, match="closure"):
        optimizer.step(lambda: None)


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
def test_masters_of_other_dtypes_are_refused(dtype):
    network = mlp()
    optimizer = sgd(network)
    optimizer.param_groups[0]["params"].append(torch.ones(1, dtype=dtype))
    network, optimizer = initialize(network, optimizer, opt_level="O2")
    with pytest.raises(TypeError):
        optimizer.zero_grad()


# --- what is given back


@each_level
def test_models_and_optimizers_come_back_as_they_were_given(level):
    def give(models, *optimizers):
        return initialize(models, *optimizers, opt_level=level)

    a, b = mlp(), mlp()
    assert give(a) is a
    assert give([b]) == [b]
    a, b = mlp(), mlp()
    first, second = sgd(a), sgd(b)
    result = give(a, first)
    assert result[0] is a
    assert result[1] is first
    result = give([b], [second])
    assert [type(part) for part in result] == [list, list]
    assert (result[0][0], result[1][0]) == (b, second)
    model, optimizers = give(mlp(), [])
    assert isinstance(model, nn.Module)
    assert optimizers == []


@pytest.mark.parametrize("optimizers", ["none", "one", "list"])
def test_disabled_returns_what_came(optimizers, device):
    network = mlp().to(device)
    given = {"none": None, "one": sgd(network), "list": [sgd(network)]}[optimizers]
    result = amp.initialize(network, given, enabled=False, opt_level="O2")
    assert result is network if given is None else (result[0] is network and result[1] is given)
    loss = network(torch.ones(1, 4, device=device)).sum()
    with amp.scale_loss(loss, given) as scaled:
        assert scaled is loss
    assert loss.dtype == torch.float32
    assert amp.state_dict() == {}
    with amp.disable_casts():
        pass


@pytest.mark.parametrize(
    ("level", "scale", "factor"),
    [("O0", None, 1.0), ("O1", None, 2.0**16), ("O1", 1.0, 1.0), ("O2", 8.0, 8.0), ("O3", None, 1.0)],
)
def test_what_scale_loss_yields(level, scale, factor):
    network = mlp()
    network, optimizer = initialize(network, sgd(network), opt_level=level, loss_scale=scale)
    for dtype in (torch.float16, torch.float32):
        with amp.scale_loss(torch.tensor(1.5, dtype=dtype), optimizer) as scaled:
            assert scaled.dtype == torch.float32
            assert scaled.item() == 1.5 * factor


def test_master_params_of_any_optimizer():
    network = mlp()
    optimizer = torch.optim.SGD([{"params": network[0].parameters()}, {"params": network[2].parameters()}], lr=0.1)
    assert list(map(id, amp.master_params(optimizer))) == list(map(id, network.parameters()))


# --- what becomes of inputs and outputs


class Batch:
    """A batch class of a user's own."""

    def __init__(self, value):
        self.value = value

    def to(self, dtype):
        return Batch(self.value.to(dtype))


class Output(OrderedDict):
    """A mapping whose keys are attributes too."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


Pair = namedtuple("Pair", "first second")


class Echo(nn.Module):
    """Returns its arguments, and notes them."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, *args, **kwargs):
        self.seen = args, kwargs
        return args[0] if len(args) == 1 else args


DTYPES = [("O0", torch.float32, torch.float32), ("O2", torch.float16, torch.float32)]
DTYPES += [("O3", torch.float16, torch.float32)]


@pytest.mark.parametrize(("level", "inside", "outside"), DTYPES)
def test_inputs_and_outputs_are_cast_wherever_they_are(level, inside, outside):
    def given():
        return {
            "tensor": torch.ones(2, dtype=torch.float64),
            "list": [torch.ones(1), (torch.ones(1), "text")],
            "named": Pair(torch.ones(1), torch.arange(2)),
            "own": Batch(torch.ones(1)),
            "array": np.ones(2),
            "none": None,
        }

    def check(found, dtype):
        assert found["tensor"].dtype == dtype
        assert found["list"][0].dtype == found["list"][1][0].dtype == dtype
        assert found["list"][1][1] == "text"
        assert type(found["list"][1]) is tuple
        assert type(found["named"]) is Pair
        assert (found["named"].first.dtype, found["named"].second.dtype) == (dtype, torch.int64)
        assert found["own"].value.dtype == dtype
        assert found["array"].dtype == np.float64
        assert found["none"] is None

    network = initialize(Echo(), opt_level=level)
    found = network(given(), extra=given())
    (arrived,), kwargs = network.seen
    check(arrived, inside)
    check(kwargs["extra"], inside)
    check(found, outside)
    result = network(Output(logits=torch.ones(1), labels=torch.arange(2)))
    assert type(result) is Output
    assert result.logits.dtype == outside
    assert result.labels.dtype == torch.int64


@pytest.mark.parametrize("level", LEVELS)
def test_outputs_may_be_cast(level):
    network = initialize(mlp(), opt_level=level, cast_model_outputs=torch.float64)
    assert network(torch.ones(1, 4)).dtype == torch.float64


def test_what_is_converted():
    def build():
        return nn.ModuleDict(
            {
                "conv": nn.Conv2d(1, 1, 1),
                "batch": nn.BatchNorm2d(1),
                "plain": nn.BatchNorm2d(1, affine=False),
                "layer": nn.LayerNorm(2),
                "rows": nn.Embedding(3, 2),
            }
        )

    def dtypes(network):
        return {n: t.dtype for n, t in (*network.named_parameters(), *network.named_buffers()) if "tracked" not in n}

    half, single = torch.float16, torch.float32
    o2 = dtypes(initialize(build(), opt_level="O2"))
    assert {n for n, dtype in o2.items() if dtype == single} == {
        f"batch.{name}" for name in ("weight", "bias", "running_mean", "running_var")
    }
    for level, dtype in {"O0": single, "O1": single, "O3": half}.items():
        assert set(dtypes(initialize(build(), opt_level=level)).values()) == {dtype}
    assert set(dtypes(initialize(build(), opt_level="O2", keep_batchnorm_fp32=False)).values()) == {half}
    assert dtypes(initialize(build(), opt_level="O3", keep_batchnorm_fp32=True)) == o2
