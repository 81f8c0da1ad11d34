"""--onnx-export: onnxruntime's numbers are the model's own, and no failure of the export costs anything else."""

import errno
import importlib.util
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lm.model.onnx_file
from checkpoints import saved_weights
from lm.model.language_model import KINDS, RNNModel
from lm.model.model_file import load_model
from programs import HALF, SCRIPTS, TINY, WORDS, read_run
from roundoff.errors import RunError
from runs import outcome, resume

installed = all(importlib.util.find_spec(name) is not None for name in ("onnx", "onnxruntime"))
needed = pytest.mark.skipif(not installed, reason="the extra onnx is not installed")

EXPORT = ("--onnx-export", "model.onnx")


def tensors(state: Any) -> list[Tensor]:
    return list(state) if isinstance(state, tuple) else [state]


def compare(file: Path | bytes, model: RNNModel, words: int, batch: int, relative: float, steps: int = 1) -> None:
    """onnxruntime's logits and state against the model's, within a part of the largest number of each.

    Each of `steps` calls goes on with the state that the last one gave, from one that is not zero.
    """
    import onnxruntime

    content = file if isinstance(file, bytes) else file.read_bytes()
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    names = [input.name for input in session.get_inputs()]
    random = torch.Generator().manual_seed(words * 100 + batch)
    state = [torch.randn(zeros.shape, generator=random) for zeros in tensors(model.init_hidden(batch))]
    found = [h.numpy() for h in state]
    dtype = model.decoder.weight.dtype
    state = [h.to(dtype) for h in state]
    for _ in range(steps):
        tokens = torch.randint(model.options["ntokens"], (words, batch), generator=random)
        with torch.no_grad():
            logits, new = model(tokens, state[0] if len(state) == 1 else tuple(state))
        state = tensors(new)
        scores, *found = session.run(None, dict(zip(names, [tokens.numpy(), *found], strict=True)))
        assert len(found) == len(state)
        for a, b in zip([scores, *found], [logits, *state], strict=True):
            assert a.dtype == "float32"
            assert a.shape == b.shape
            assert float((torch.from_numpy(a) - b).abs().max()) <= relative * float(b.abs().max())


def make(kind: str, tied: bool, layers: int, emsize: int = 8) -> RNNModel:
    """With biases, norms and gates that differ from each other, so that none can stand for another."""
    torch.manual_seed(4)
    model = RNNModel(kind, 16, emsize, 8, layers, 0.5, tied, nhead=1 if emsize % 2 else 2, context=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.eval()


@needed
@pytest.mark.parametrize(("tied", "layers"), [(False, 2), (True, 1), (True, 3)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_at_any_size(kind, tied, layers) -> None:
    from onnx import checker

    from lm.model.onnx_graph import build

    model = make(kind, tied, layers)
    proto = build(model, WORDS)
    checker.check_model(proto, full_check=True)
    for words, batch in ((5, 2), (1, 1), (12, 3)):
        compare(proto.SerializeToString(), model, words, batch, 1e-5, steps=2)


@needed
def test_sizes_that_are_not_even() -> None:
    from lm.model.onnx_graph import build

    for model in (make("Transformer", True, 1, 7), make("Transformer", False, 2, 5), make("LSTM", False, 2, 5)):
        compare(build(model, WORDS).SerializeToString(), model, 6, 2, 1e-5)


@needed
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("script", "flags"), [("main", []), *((s, HALF[s]) for s in SCRIPTS)])
def test_every_trainers_model(programs, script, flags, kind) -> None:
    """The file has the weights of model.safetensors, in fp32: half numbers are fp32 numbers too."""
    lr = "0.5" if kind == "Transformer" else "5"
    run = programs.train(script, *flags, *EXPORT, "--model", kind, "--lr", lr, "--max-steps", "9", "--epochs", "1")
    assert "| model.onnx: ONNX opset 17, fp32; onnxruntime is within " in run.out
    assert run.config["options"]["onnx_export"] == "model.onnx"
    model, _ = load_model(Path("model.safetensors"))
    compare(Path("model.onnx"), model.eval(), 7, 3, 1e-5)
    if flags and script != "main_amp":  # model.safetensors is half: against what the trained model itself says in fp16
        assert {w.dtype for w in saved_weights(Path("model.safetensors")).values()} == {torch.float16}
        compare(Path("model.onnx"), model.half(), 7, 3, 0.01)


@needed
def test_what_the_file_says_of_itself(programs) -> None:
    import onnxruntime

    programs.train("main", *EXPORT, "--dry-run")
    session = onnxruntime.InferenceSession("model.onnx", providers=["CPUExecutionProvider"])
    model, vocabulary = load_model(Path("model.safetensors"))
    assert json.loads(session.get_modelmeta().custom_metadata_map["vocabulary"]) == vocabulary
    assert json.loads(session.get_modelmeta().custom_metadata_map["options"]) == model.options
    words = ["words", "batch"]
    state = [2, "batch", 8]
    assert {i.name: (i.type, i.shape) for i in session.get_inputs()} == {
        "tokens": ("tensor(int64)", words),
        "hidden": ("tensor(float)", state),
        "cell": ("tensor(float)", state),
    }
    assert {o.name: (o.type, o.shape) for o in session.get_outputs()} == {
        "logits": ("tensor(float)", [*words, model.options["ntokens"]]),
        "new_hidden": ("tensor(float)", state),
        "new_cell": ("tensor(float)", state),
    }


@needed
def test_tied_weights_are_there_once() -> None:
    from lm.model.onnx_graph import build

    sizes = {tied: len(build(make("GRU", tied, 1), WORDS).SerializeToString()) for tied in (False, True)}
    assert sizes[False] - sizes[True] > 16 * 8 * 4


@needed
def test_it_is_the_best_model_and_changes_nothing(programs) -> None:
    """At this rate the second epoch is worse than the first, and its weights are not those that are kept."""
    flags = ("--lr", "60")
    run = programs.train("main", *flags)
    losses = [epoch["valid_loss"] for epoch in run.epochs]
    assert min(losses) < losses[-1]
    plain = outcome(programs.folder)
    done = programs.run("main", *TINY, *flags, *EXPORT, "--run-dir", "b", "--save", "b.pt")
    assert (done.code, done.err) == (0, "")
    assert outcome(programs.folder, "b", "b.pt") == plain
    compare(Path("model.onnx"), load_model(Path("b.pt"))[0].eval(), 4, 2, 1e-5)


@needed
def test_into_the_run_directory(programs) -> None:
    programs.train("main", "--dry-run", "--onnx-export", "run/model.onnx")
    assert (programs.folder / "run/model.onnx").is_file()


@needed
def test_of_a_run_that_has_ended_long_ago(programs) -> None:
    programs.train("main", "--fp16")
    before = outcome(programs.folder)
    resume(programs, "main", *EXPORT)
    assert outcome(programs.folder) == before
    compare(Path("model.onnx"), load_model(Path("model.safetensors"))[0].eval(), 4, 2, 1e-5)


def full_disk(monkeypatch: pytest.MonkeyPatch) -> str:
    def fail(path: Path, *_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(lm.model.onnx_file, "write_atomically", fail)
    return "No space left on device"


def wrong_numbers(monkeypatch: pytest.MonkeyPatch) -> str:
    import lm.model.onnx_graph

    monkeypatch.setitem(lm.model.onnx_graph.GATES, "LSTM", (0, 1, 2, 3))
    return "onnxruntime's numbers differ from the model's own by "


def too_large(monkeypatch: pytest.MonkeyPatch) -> str:
    import lm.model.onnx_graph

    def fail(*_: object) -> None:
        raise ValueError("Message onnx.ModelProto exceeds maximum protobuf size of 2GB:\n 2147483648")

    monkeypatch.setattr(lm.model.onnx_graph, "build", fail)
    return "exceeds maximum protobuf size of 2GB: 2147483648"


def refused_by_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> str:
    import lm.model.onnx_graph

    monkeypatch.setattr(lm.model.onnx_graph, "OPSET", 9999)
    return "[ONNXRuntimeError]"


def fails_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> str:
    """An embedding that lacks the last words, which onnxruntime finds out when it is asked for one."""
    from onnx import numpy_helper

    import lm.model.onnx_graph

    real_build = lm.model.onnx_graph.build

    def build(*args: Any) -> Any:
        proto = real_build(*args)
        (encoder,) = (weight for weight in proto.graph.initializer if weight.name == "encoder.weight")
        encoder.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(encoder)[:3], encoder.name))
        return proto

    monkeypatch.setattr(lm.model.onnx_graph, "build", build)
    return "[ONNXRuntimeError]"


@contextmanager
def descriptor_2(path: Path) -> Iterator[None]:
    """Let what is written to it go to `path`: code that is not Python's writes there and not to sys.stderr."""
    before = os.dup(2)
    with path.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(before, 2)
        os.close(before)


@needed
@pytest.mark.parametrize("fault", [full_disk, wrong_numbers, too_large, refused_by_onnxruntime, fails_while_it_runs])
def test_a_failing_export_costs_nothing_else(programs, monkeypatch, fault) -> None:
    programs.train("main")
    plain = outcome(programs.folder)
    (programs.folder / "model.onnx").write_text("old")
    with monkeypatch.context() as patch, descriptor_2(Path("stderr")):
        said = fault(patch)
        done = programs.run("main", *TINY, *EXPORT, "--run-dir", "b", "--save", "b.pt")
    assert done.code == RunError.exit_code
    assert done.err.startswith("error: --onnx-export model.onnx: ")
    assert said in done.err
    assert done.err.count("\n") == 1
    assert len(done.err) < 500
    assert outcome(programs.folder, "b", "b.pt") == plain
    assert (programs.folder / "model.onnx").read_text() == "old"
    assert not list(programs.folder.rglob(".*"))
    assert Path("stderr").read_bytes() == b""
    assert programs.run("main", "--resume", "b", *EXPORT).code == 0
    assert read_run(programs.folder / "b").result["status"] == "finished"
    compare(Path("model.onnx"), load_model(Path("b.pt"))[0].eval(), 4, 2, 1e-5)


@needed
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("corpus/train.txt/x.onnx", "cannot write in corpus/train.txt"),
        ("corpus", "is a directory"),
        ("./model.safetensors", "--save are both"),
    ],
)
def test_a_place_that_will_not_do_is_found_before_the_work(programs, path, said) -> None:
    error = programs.refuse("main", *TINY, "--onnx-export", path)
    assert "--onnx-export" in error
    assert said in error


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_without_the_package_a_line_says_how_to_install_it(programs, monkeypatch, missing) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    error = programs.refuse("main", *TINY, *EXPORT)
    assert f"no {missing if installed else 'onnx'} here" in error
    assert "pip install 'roundoff[onnx]'" in error


@needed
@pytest.mark.slow
def test_of_several_processes_the_first_one_writes(ranks) -> None:
    ranks.train(2, "main", "--dry-run", *EXPORT, name="b")
    assert [(ranks.folder / f"out-{n}").read_text().count("model.onnx") for n in range(2)] == [1, 0]
    compare(ranks.folder / "model.onnx", load_model(ranks.folder / "b.pt")[0].eval(), 4, 2, 1e-5)


@needed
def test_of_several_processes_the_others_do_not_try(ranks) -> None:
    """And what the first one fails at is its own matter."""
    (ranks.folder / "b/model.onnx").mkdir(parents=True)
    flags = ("--dry-run", "--onnx-export", "b/model.onnx", "--save", "b.pt")
    ended = ranks.run(2, "main", *TINY, *flags, "--run-dir", "b")
    assert ended.codes == [1, 0]
    assert ended.err[0].startswith("error: ")
    assert "--onnx-export b/model.onnx: Is a directory" in ended.err[0]
    assert ended.err[1] == ""
    assert read_run(ranks.folder / "b").result["status"] == "finished"
