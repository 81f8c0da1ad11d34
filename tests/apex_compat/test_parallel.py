"""apex_compat.parallel: several gloo processes do what one process does that has the whole batch."""

import importlib
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

import apex_compat
import parallel_cases as cases
from apex_compat import parallel
from apex_compat.parallel import LARC, DistributedDataParallel, SyncBatchNorm, convert_syncbn_model, multiproc
from apex_compat.parallel import distributed as flat
from fp16_cases import same, snapshot
from programs import ROOT

needs_ranks = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="this torch has no torch.distributed, and so no ranks"
)


@pytest.fixture(scope="module")
def runs(all_ranks, tmp_path_factory):
    """Ranks -> what the cases returned on each rank."""
    folder = all_ranks.folder = tmp_path_factory.mktemp("parallel")
    found = {}
    for world in (2, 3):
        ended = all_ranks.run(world, "main", apex_parallel={})
        assert ended.codes == [0] * world, ended.err
        found[world] = [torch.load(folder / f"{world}-{rank}.pt") for rank in range(world)]
    return found


@pytest.fixture(params=[pytest.param(2, marks=needs_ranks), pytest.param(3, marks=needs_ranks)], ids="{} ranks".format)
def found(request, runs):
    """What the cases returned on each rank."""
    return runs[request.param]


def close(a, b, tolerance=1e-12):
    """Compare two nests of dicts, lists and tensors, whatever their dtypes."""
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            close(a[key], b[key], tolerance)
    elif a is None or b is None:
        assert a is b
    else:
        torch.testing.assert_close(a.double(), b.double(), rtol=tolerance, atol=tolerance)


# --- DistributedDataParallel and Reducer ---


def reduced(grads, always_fp32=False, average=True, predivide=1.0):
    """The contract: multiply by 1 / predivide, sum, multiply by predivide / ranks, round."""
    dtype = grads[0].dtype
    wide = torch.float32 if always_fp32 and dtype.itemsize == 2 else dtype
    total = sum(grad.to(wide) * (1 / predivide) for grad in grads)
    return (total * (predivide / len(grads)) if average else total).to(dtype)


@pytest.mark.parametrize("case", cases.REDUCTIONS)
def test_a_gradient_becomes_what_the_arguments_say_in_every_bit(found, case):
    arguments = cases.REDUCTIONS[case]
    expected = {
        name: reduced(
            [cases.gradient(rank, dtype) for rank in range(len(found))],
            arguments.get("allreduce_always_fp32", False),
            arguments.get("gradient_average", True),
            arguments.get("gradient_predivide_factor", 1.0),
        )
        for name, dtype in cases.DTYPES.items()
    }
    # The sum leaves float16, unless it is divided before or taken in float32.
    assert expected["f16"][-1].isinf() == ("predivided" not in case and case != "fp32")
    for rank in found:
        assert same(snapshot(rank["reductions"][case]), snapshot(expected))


def test_unused_parameters_cost_nothing_and_mix_nothing(found):
    world = len(found)
    first = {f"of_{r}": 6.0 * (r + 1) / world for r in range(world)} | {"of_nobody": None}
    second = first | {"of_0": first["of_0"] + 6.0 * sum(range(world)) / world}
    third = second | {"of_1": second["of_1"] + 6.0 / world}
    for rank in found:
        for got, expected in zip(rank["unused"], (first, second, third), strict=True):
            close(got, {name: None if v is None else torch.full((2,), v) for name, v in expected.items()}, 1e-6)


@pytest.mark.parametrize("way", cases.WAYS, ids=lambda way: way.__name__)
def test_each_gradient_is_summed_once_at_the_end_of_backward(found, way):
    world = len(found)
    alone = [
        cases.gradients_of(way(lambda network: network, lambda step, rank=rank: cases.share(step, rank, world)))
        for rank in range(world)
    ]
    expected = {name: None if grad is None else sum(one[name] for one in alone) for name, grad in alone[0].items()}
    assert sum(grad is not None for grad in expected.values()) == (2 if way is cases.unfrozen else 6)
    for rank in found:
        close(rank["ways"][way.__name__], expected)
        assert same(snapshot(rank["ways"][way.__name__]), snapshot(found[0]["ways"][way.__name__]))


@pytest.mark.parametrize("optimizer", cases.OPTIMIZERS)
def test_training_is_that_of_one_process_with_the_whole_batch(found, optimizer):
    expected = cases.train(cases.normalized(0), cases.OPTIMIZERS[optimizer], cases.batch)
    for i, rank in enumerate(found):
        state = rank["training"][optimizer]
        assert all(name.startswith("module.") for name in state)
        state = {name.removeprefix("module."): value for name, value in state.items()}
        assert state.pop("seed") == i  # a buffer stays as it was
        close(state, {name: value for name, value in expected.items() if name != "seed"})


def test_reducer_averages_on_request(found):
    world = len(found)
    mean = sum(range(world)) / world
    for rank in found:
        got = rank["reducers"]
        assert got["parameter"].tolist() == [0.0, 0.0]
        assert got["gradients"]["idle"] is None
        assert got["gradients"]["b"].tolist() == [1.0] * 3
        assert got["gradients"]["a"].tolist() == [mean] * 2
        assert [t.tolist() for t in (got["loose"][0], got["loose"][1]["x"][0])] == [[mean] * 2, [mean] * 3]


def test_a_parameter_that_is_returned_gathers_no_hooks(found):
    for rank in found:
        assert rank["temperature"]["hooks"] == [0, 0]
        assert rank["temperature"]["gradient"].item() == 1 + 6.0 * sum(range(len(found))) / len(found)


WRONG = [
    ({"shared_param": True}, "shared_param is given; it must be None: a shared parameter needs no option"),
    (
        {"delay_allreduce": True, "allreduce_trigger_params": []},
        "allreduce_trigger_params is given with delay_allreduce=True; leave one of them out",
    ),
    (
        {"delay_allreduce": True, "num_allreduce_streams": 2},
        "num_allreduce_streams is 2 with delay_allreduce=True; leave one of them out",
    ),
    ({}, "Default process group has not been initialized, please make sure to call init_process_group."),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_of_ddp(arguments, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        DistributedDataParallel(nn.Linear(1, 1), **arguments)
    assert str(error.value) == message


def test_flat_helpers():
    tensors = [torch.ones(2, dtype=t) for t in (torch.float64, torch.float16, torch.int64, torch.bfloat16)]
    tensors += [torch.full((1, 3), 2.0, dtype=torch.float16), torch.zeros((), dtype=torch.float32)]
    by_type = flat.split_by_type(tensors)
    assert {name: len(same_type) for name, same_type in by_type.items()} == {
        "torch.DoubleTensor": 1,
        "torch.HalfTensor": 2,
        "torch.LongTensor": 1,
        "torch.BFloat16Tensor": 1,
        "torch.FloatTensor": 1,
    }
    halves = flat.split_half_float_double(tensors)
    assert [(len(bucket), bucket[0].dtype) for bucket in halves] == [
        (2, torch.float16),
        (1, torch.float32),
        (1, torch.float64),
        (1, torch.bfloat16),
    ]
    together = flat.flatten(halves[0])
    assert together.tolist() == [1, 1, 2, 2, 2]
    assert [part.shape for part in flat.unflatten(together, halves[0])] == [(2,), (1, 3)]
    found = []
    flat.extract_tensors({"a": tensors[:1], "b": (tensors[1], "text", {"c": tensors[2]})}, found)
    assert all(a is b for a, b in zip(found, tensors[:3], strict=True))
    flat.flat_dist_call(tensors, torch.Tensor.add_, (1,))
    assert [tensor.flatten().tolist() for tensor in tensors] == [[2, 2], [2, 2], [2, 2], [2, 2], [3, 3, 3], [1]]


# --- SyncBatchNorm ---


def whole(case, ranks):
    """Return what torch's batch norm makes of the batches of `ranks` together, in float64.

    Each step has the results of each rank and the gradients of weight and bias. Behind the steps come the state and
    an evaluation.
    """
    arguments = dict(case.arguments)
    last, relu = (arguments.pop(name, False) for name in ("channel_last", "fuse_relu"))
    layer = case.affine(nn.SyncBatchNorm(case.channels, dtype=torch.float64, **arguments))  # takes any shape

    def forward(x, z=None):
        out = layer(x.movedim(-1, 1)).movedim(1, -1) if last else layer(x)
        out = out if z is None else out + z
        return out.relu() if relu else out

    steps = []
    for step in (0, 1):
        data = [case.data(step, rank) for rank in ranks]
        x, z, of_out = (torch.cat(parts).double().requires_grad_() for parts in zip(*data, strict=True))
        layer.zero_grad()
        out = forward(x, z if case.adds else None)
        out.backward(of_out)
        rows = [case.rows[rank] for rank in ranks]
        parts = ([None] * len(rows) if t is None else t.split(rows) for t in (out, x.grad, z.grad))
        of_ranks = [dict(zip(("out", "x", "z"), part, strict=True)) for part in zip(*parts, strict=True)]
        steps.append((of_ranks, cases.gradients_of(layer)))
    layer.eval()
    return steps, layer.state_dict(), forward(case.data(2, 1)[0].double())


def check_batch_norm(case, results, ranks):
    """Compare what `ranks` have in `results` with one batch norm."""
    steps, state, evaluated = whole(case, ranks)
    for step, (parts, of_parameters) in enumerate(steps):
        for rank, part in zip(ranks, parts, strict=True):
            got = results[rank]["steps"][step]
            assert got["out"].dtype == got["x"].dtype == case.dtype
            close({name: got[name] for name in part}, part, case.tolerance)
        for name, grad in of_parameters.items():
            close(sum(results[rank]["steps"][step][name].double() for rank in ranks), grad, 10 * case.tolerance)
    for rank in ranks:
        close(results[rank]["state"], state, case.tolerance)
        assert same(snapshot(results[rank]["state"]), snapshot(results[ranks[0]]["state"]))
        if rank == 0:
            close(results[rank]["evaluated"], evaluated, 4 * case.tolerance)


@pytest.mark.parametrize("name", cases.BATCH_NORMS)
def test_batch_norm_is_that_of_the_whole_batch(found, name):
    results = [rank["batch_norms"][name] for rank in found]
    check_batch_norm(cases.BATCH_NORMS[name], results, range(len(found)))


def test_batch_norm_in_groups(found):
    world = len(found)
    partitions = {
        "first two": [[0, 1], [2]][: world - 1],
        "alone": [[rank] for rank in range(world)],
        "everybody": [range(world)],
        "default": [range(world)],
    }
    for name, partition in partitions.items():
        for ranks in partition:
            check_batch_norm(cases.BATCH_NORMS["unequal"], [rank["batch_norms"][name] for rank in found], ranks)


def test_mistakes_of_several_ranks(found):
    no_second = "SyncBatchNorm over several processes has no second derivative; leave out create_graph"
    for rank in found:
        assert rank["mistakes"] == {
            "second_derivative": f"RuntimeError: {no_second}",
            "sparse": "TypeError: weight has a sparse gradient; it must be dense (for an embedding: sparse=False)",
            "group_size": f"ValueError: group_size is 5; it must be 0 or divide the number of processes, {len(found)}",
        }


def test_alone_batch_norm_is_torchs_in_every_bit():
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm(3, momentum=None), nn.BatchNorm2d(3, momentum=None)
    last = SyncBatchNorm(3, momentum=None, channel_last=True, fuse_relu=True)
    for _ in range(2):
        x = torch.randn(4, 3, 2, 2)
        assert torch.equal(ours(x), theirs(x))
        z = torch.randn(4, 2, 2, 3)
        torch.testing.assert_close(last(x.movedim(1, -1), z), (theirs.train()(x).movedim(1, -1) + z).relu())
        theirs.load_state_dict(ours.state_dict())
    assert same(snapshot(ours), snapshot(theirs))
    assert torch.equal(ours.eval()(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("arguments", "shape", "message"),
    [
        ({}, (2, 4, 3), "an input has 4 channels; it must have 3, in the shape (N, C, *)"),
        ({"channel_last": True}, (2, 3, 4), "an input has 4 channels; it must have 3, in the shape (N, *, C)"),
        ({"channel_last": True}, (3,), "an input has no channels; it must have 3, in the shape (N, *, C)"),
    ],
)
def test_batch_norm_refuses_a_wrong_shape(arguments, shape, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  the whole message is compared
        SyncBatchNorm(3, **arguments)(torch.zeros(shape))
    assert str(error.value) == message


def test_convert_keeps_everything_but_the_class():
    torch.manual_seed(0)
    shared = nn.BatchNorm1d(4, eps=0.1, momentum=None)
    model = nn.Sequential(
        nn.Linear(4, 4),
        nn.Sequential(shared, nn.BatchNorm1d(4, affine=False).double()),
        nn.InstanceNorm1d(4, affine=True, track_running_stats=True),
        nn.BatchNorm1d(4, track_running_stats=False).half(),
        SyncBatchNorm(4, fuse_relu=True),
        shared,
    )
    model[1][1].eval()
    before, state = list(model.parameters()), snapshot(model)
    buffers = dict(model.named_buffers())
    assert convert_syncbn_model(model, channel_last=True) is model
    kinds = [type(layer) for layer in model.modules() if not list(layer.children())]
    assert kinds.count(SyncBatchNorm) == 5
    assert kinds.count(nn.InstanceNorm1d) == 1
    assert len(kinds) == 7
    assert all(a is b for a, b in zip(model.parameters(), before, strict=True))
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert same(snapshot(model), state)
    assert (model[1][0].eps, model[1][0].momentum, model[4].fuse_relu, model[3].channel_last) == (0.1, None, True, True)
    assert [model[1][0].training, model[1][1].training] == [True, False]
    assert isinstance(convert_syncbn_model(nn.BatchNorm2d(3)), SyncBatchNorm)


# --- LARC ---


def by_formula(p, g, lr, weight_decay, trust, clip, eps):
    """Return the adapted gradient, in Python's float64."""
    p_norm, g_norm = (sum(v * v for v in values) ** 0.5 for values in (p, g))
    if not (p_norm and g_norm):
        return g
    rate = trust * p_norm / (g_norm + weight_decay * p_norm + eps)
    rate = min(rate / lr, 1) if clip else rate
    return [(b + weight_decay * a) * rate for a, b in zip(p, g, strict=True)]


def larc(values, grads, lr=0.1, weight_decay=0.0, dtype=torch.float64, **kwargs):
    """Return LARC over SGD with a parameter for each of `values`, whose gradients are there."""
    params = [nn.Parameter(torch.tensor(value, dtype=dtype)) for value in values]
    for param, grad in zip(params, grads, strict=True):
        param.grad = None if grad is None else torch.tensor(grad, dtype=dtype)
    return params, LARC(torch.optim.SGD(params, lr=lr, weight_decay=weight_decay), **kwargs)


VALUES = [[3.0, -4.0], [0.0, 0.0], [1.0, 2.0], [5.0, 1.0]]
GRADS = [[0.5, 0.25], [1.0, 1.0], [0.0, 0.0], [1e-4, -1e-4]]


@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("weight_decay", [0.0, 0.5])
@pytest.mark.parametrize(("lr", "trust", "eps"), [(0.1, 0.02, 1e-8), (1e-3, 0.5, 0.25), (0.0, 0.02, 0.0)])
def test_larc_formula(clip, weight_decay, lr, trust, eps):
    if lr == 0:
        lr = 1e-300  # Python cannot divide by 0; torch can, and clips
    params, optimizer = larc(VALUES, GRADS, lr, weight_decay, clip=clip, trust_coefficient=trust, eps=eps)
    optimizer.step()
    for param, value, grad in zip(params, VALUES, GRADS, strict=True):
        adapted = by_formula(value, grad, lr, weight_decay, trust, clip, eps)
        close(param.grad, torch.tensor(adapted, dtype=torch.float64))
        close(param.detach(), torch.tensor([a - lr * b for a, b in zip(value, adapted, strict=True)]), 1e-6)
    assert optimizer.param_groups[0]["weight_decay"] == weight_decay


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_larc_takes_norms_in_float32(dtype):
    params, optimizer = larc([[300.0] * 4, [1.0]], [[1e-7] * 4, None], clip=False, dtype=dtype)
    value, grad = params[0][0].item(), params[0].grad[0].item()
    optimizer.step()
    adapted = by_formula([value] * 4, [grad] * 4, 0.1, 0.0, 0.02, False, 1e-8)  # a rate of 5e7
    close(params[0].grad, torch.tensor(adapted), torch.finfo(dtype).eps)
    assert params[1].item() == 1


def test_larc_at_learning_rate_0_waits_for_warm_up():
    (param,), optimizer = larc([[3.0, 4.0]], [[1.0, 1.0]], lr=0.0)
    optimizer.step()
    assert param.tolist() == [3.0, 4.0]
    assert param.grad.tolist() == [1.0, 1.0]


def test_larc_puts_weight_decay_back_after_a_failure():
    _, optimizer = larc(VALUES, GRADS, weight_decay=0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "weight_decay": 0.25})
    seen = []

    def fail(inner, *_):
        seen.extend(group["weight_decay"] for group in inner.param_groups)
        raise ArithmeticError

    optimizer.optim.register_step_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        optimizer.step()
    assert seen == [0, 0]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.25]


SCHEDULERS = {
    "step": lambda o: torch.optim.lr_scheduler.StepLR(o, 1, gamma=0.5),
    "one cycle": lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.5, total_steps=9),
    "cyclic": lambda o: torch.optim.lr_scheduler.CyclicLR(o, 0.1, 0.5, step_size_up=2),
    "warm-up": lambda o: torch.optim.lr_scheduler.LinearLR(o),
    "plateau": lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o, patience=0),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_move_larc(name):
    def rates(optimizer, scheduler):
        found = []
        for _ in range(4):
            optimizer.step()
            scheduler.step(*([1.0] if name == "plateau" else []))
            found.append((optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]))
        return found

    plain = torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9)
    expected = rates(plain, SCHEDULERS[name](plain))
    wrapped = LARC(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1, momentum=0.9))
    assert rates(wrapped, SCHEDULERS[name](wrapped)) == expected


def test_larc_is_an_optimizer():
    params, optimizer = larc(VALUES, GRADS, weight_decay=0.5)
    twin_params, twin = larc(VALUES, GRADS, weight_decay=0.5)
    assert isinstance(optimizer, torch.optim.Optimizer)
    optimizer.step()

    def closure():
        for param, grad in zip(twin_params, GRADS, strict=True):
            param.grad.copy_(torch.tensor(grad, dtype=torch.float64))
        return (twin_params[0] * 2).sum()

    loss = twin.step(closure)
    assert (loss.item(), loss.requires_grad) == (-2, True)
    assert same(snapshot(params), snapshot(twin_params))
    assert optimizer.state is optimizer.optim.state
    assert optimizer.state_dict() == optimizer.optim.state_dict()
    state = optimizer.state_dict()
    state["param_groups"][0]["lr"] = 7.0
    optimizer.load_state_dict(state)
    assert optimizer.optim.param_groups[0]["lr"] == 7.0
    optimizer.zero_grad(set_to_none=False)
    assert params[0].grad.tolist() == [0, 0]
    optimizer.zero_grad()
    assert params[0].grad is None


# --- ways in ---


def test_apex_names_are_these(monkeypatch):
    names = ("LARC", "distributed", "optimized_sync_batchnorm", "sync_batchnorm")
    with apex_compat.provide_apex():
        for name in names:
            assert importlib.import_module(f"apex.parallel.{name}") is sys.modules[f"apex_compat.parallel.{name}"]
        module = importlib.import_module("apex").parallel
        monkeypatch.setattr(sys, "argv", ["multiproc"])
        with pytest.raises(SystemExit, match="2"):
            runpy.run_module("apex.parallel.multiproc", run_name="__main__", alter_sys=True)
    assert module is parallel
    assert parallel.LARC is LARC
    assert sys.modules["apex_compat.parallel.optimized_sync_batchnorm"].SyncBatchNorm is SyncBatchNorm
    assert parallel.ReduceOp is torch.distributed.ReduceOp


@pytest.fixture
def python(tmp_path, monkeypatch):
    """Stands in for Python: prints its arguments. The rank named behind --fail fails, the one behind --wait waits."""
    path = tmp_path / "python"
    path.write_text(
        """#!/bin/sh
        echo "$@"
        for last; do :; done
        case "$*" in
        *"--fail $last "*) exit 3;;
        *"--wait $last "*) trap 'kill $!; exit 1' TERM; sleep 60 & wait; touch waited;;
        esac
        """
    )
    path.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(path))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_multiproc_starts_a_script_once_a_rank(python, capfd):
    assert multiproc.main(["train.py", "--world-size", "3", "--lr", "1"]) == 0
    said = [capfd.readouterr().out, *((python / f"GPU_{rank}.log").read_text() for rank in (1, 2))]
    assert said == [f"-m apex_compat train.py --lr 1 --world-size 3 --rank {rank}\n" for rank in range(3)]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--fail", "1", "--wait", "0", "--world-size", "2"], 1, ""),
        (["--world-size", "0"], 2, "error: the number of processes is '0'; it must be 1 at least: give --world-size N"),
        (["--world-size", "x"], 2, "error: the number of processes is 'x'; it must be 1 at least: give --world-size N"),
    ],
)
def test_multiproc_fails(python, capfd, words, code, said):
    assert multiproc.main(["train.py", *words]) == code
    assert capfd.readouterr().err.strip() == said
    assert not (python / "waited").exists()


def test_multiproc_needs_a_script(capfd):
    assert multiproc.main([]) == 2
    assert capfd.readouterr().err == "error: SCRIPT is missing; give a Python file and its arguments\n"


SCRIPT = """
import argparse
import torch
from apex.parallel import DistributedDataParallel as DDP

parser = argparse.ArgumentParser()
parser.add_argument("--world-size", type=int)
parser.add_argument("--rank", type=int)
args = parser.parse_args()
torch.distributed.init_process_group("gloo", init_method="file://STORE", rank=args.rank, world_size=args.world_size)
model = DDP(torch.nn.Linear(2, 1))
model(torch.ones(1, 2) * args.rank).sum().backward()
print(model.module.weight.grad.tolist())
torch.distributed.destroy_process_group()
"""


@needs_ranks
@pytest.mark.slow
def test_multiproc_runs_a_script_that_imports_apex(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT.replace("STORE", str(tmp_path / "store")))
    command = [sys.executable, "-m", "apex_compat.parallel.multiproc", "train.py", "--world-size", "2"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (tmp_path / "GPU_1.log").read_text() == "[[0.5, 0.5]]\n"
