"""What probe.py refuses, and that it leaves nothing behind."""

import json
import signal

import pytest
import torch

import lm.launch.probing.reference
from lm.training.checkpoint import FORMAT
from programs import PROBE, SMALL
from roundoff.runs.tensor_file import load_tensors, save_tensors

REFUSED = {
    ("--batches", "2"): "from 3 (for a deviation and its error) to 18",
    ("--batches", "19"): "to 18 (all that the corpus has)",
    ("--batches", "0"): "--batches",
    ("--modes", "fp8"): "'fp8' is no mode; there are fp32, manual",
    ("--modes", "fp32,fp32"): "fp32 is named twice",
    ("--flush-limit", "0"): "--flush-limit",
    ("--flush-limit", "nan"): "--flush-limit",
    ("--data", "nowhere"): "--data nowhere: there is no such folder",
    ("--checkpoint", "nowhere.pt"): "there is no such file",
    ("--checkpoint", "corpus"): "give a run directory",
    ("--checkpoint", "corpus/train.txt"): "cannot be read as a model file",
    ("--run", "nowhere"): "--run nowhere: there is no such directory",
    ("--run", "corpus"): "--run corpus",
    ("--run", "a", "--checkpoint", "b"): "not allowed with",
    ("--out", "corpus/train.txt"): "is no directory",
    ("--out", "/proc/nowhere"): "cannot write",
    ("extra",): "unrecognized arguments",
}


TRAINERS = {
    ("--nonsense",): "unrecognized arguments: --nonsense",
    ("--fp16",): "--modes says that",
    ("--dtype=float16",): "--modes says that",
    ("--device", "cpu"): "a probe runs on the CPU",
    ("--data", "corpus"): "give --data to probe.py itself",
    ("--resume", "run"): "give --run to probe.py itself",
    ("--batch_size", "1000"): "too few for a batch size of 1000",
}
"""Flags after --."""


@pytest.mark.parametrize("flags", REFUSED, ids=" ".join)
def test_a_mistake_is_one_line_and_leaves_nothing(programs, flags) -> None:
    trainer = () if "--run" in flags or "--checkpoint" in flags else ("--", *SMALL)
    assert REFUSED[flags] in programs.refuse("probe", "--data", "corpus", "--batches", "4", *flags, *trainer)


@pytest.mark.parametrize("flags", TRAINERS, ids=" ".join)
def test_wrong_trainer_flags(programs, flags) -> None:
    assert TRAINERS[flags] in programs.refuse("probe", "--data", "corpus", "--", *flags)


def test_a_model_flag_with_a_model_file(saved) -> None:
    error = saved.refuse("probe", "--data", "corpus", "--checkpoint", "model.safetensors", "--", "--nhid", "9")
    assert "the model is that of the file" in error
    assert "flags are those of the run" in saved.refuse("probe", "--run", "run", "--", "--nhid", "9")


def test_another_vocabulary(saved) -> None:
    assert "which are not the" in saved.refuse("probe", "--data", "corpus", "--checkpoint", "model.safetensors")


def test_a_run_without_a_checkpoint_or_with_another(programs) -> None:
    programs.train("main")
    checkpoint = programs.folder / "run" / "checkpoint.safetensors"
    content = load_tensors(checkpoint, FORMAT)
    for spoil, said in (
        (lambda c: c | {"corpus": {}}, "its corpus was another one"),
        (lambda c: c | {"precision": {}}, "not of this run"),
        (lambda c: c | {"records": {"steps": -1}}, "not counted in whole numbers"),
        (lambda c: [c], "holds no state of a run"),
    ):
        save_tensors(checkpoint, spoil(content), FORMAT)
        assert said in programs.refuse("probe", "--run", "run")
    with torch.no_grad():
        content["precision"]["masters"][0][0] = torch.nan
        content["model"]["encoder.weight"][0] = torch.nan
    save_tensors(checkpoint, content, FORMAT)
    assert "not finite" in programs.refuse("probe", "--run", "run")
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    assert "cannot be used" in programs.refuse("probe", "--run", "run")
    checkpoint.unlink()
    assert "has no checkpoint.safetensors" in programs.refuse("probe", "--run", "run")
    config = programs.folder / "run" / "config.json"
    config.write_text(json.dumps({"options": {"script": "../evil"}}))
    assert "names no trainer" in programs.refuse("probe", "--run", "run")


@pytest.mark.parametrize("name", ["probe.json", "probe.html", "probe.png"])
def test_nothing_is_overwritten(programs, name) -> None:
    (programs.folder / "probe").mkdir()
    (programs.folder / "probe" / name).write_text("mine")
    assert f"--out probe holds a {name} already" in programs.refuse("probe", *PROBE, "--", *SMALL)


def test_an_interrupt_leaves_nothing(programs, monkeypatch) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        pytest.skip("this process was told to ignore the signal, as a shell tells its background jobs")
    before = programs.files()
    monkeypatch.setattr(lm.launch.probing.reference.Reference, "run", lambda *_: signal.raise_signal(signal.SIGINT))
    done = programs.run("probe", *PROBE, "--", *SMALL)
    assert (done.code, done.out) == (130, "")
    assert programs.files() == before
