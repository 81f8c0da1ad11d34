"""What the options of model and precision do to a run."""

import pytest
import torch

from lm.model.language_model import KINDS
from lm.model.model_file import load_model
from programs import HALF, SCRIPTS, TINY, read_run

every_script = pytest.mark.parametrize("script", SCRIPTS)
every_half = pytest.mark.parametrize(("script", "flags"), [(s, HALF[s]) for s in SCRIPTS], ids=SCRIPTS)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_amp_dtype(programs, dtype):
    run = programs.train("main_amp", "--dry-run", "--dtype", dtype)
    dtypes = run.config["precision"]["dtypes"]
    assert (dtypes["hidden"], dtypes["logits"], dtypes["weights"], dtypes["loss"]) == (
        dtype,
        dtype,
        "float32",
        "float32",
    )
    mode = {"float16": "amp-fp16", "bfloat16": "amp-bf16", "float32": "amp-fp32"}[dtype]
    assert (run.config["precision"]["mode"], run.config["precision"]["dtype"]) == (mode, dtype)
    assert run.steps[0]["loss_scale"] == (2.0**16 if dtype == "float16" else 1.0)


def test_amp_is_float16_with_and_without_fp16(programs):
    plain = programs.run("main_amp", *TINY, "--dry-run")
    assert plain.code == 0
    rows = (programs.folder / "run" / "steps.jsonl").read_bytes()
    done = programs.run("main_amp", *TINY, "--dry-run", "--fp16", "--run-dir", "again")
    assert done.code == 0
    assert (programs.folder / "again" / "steps.jsonl").read_bytes() == rows
    done = programs.run("main_amp", *TINY, "--dry-run", "--fp16", "--dtype", "bfloat16", "--run-dir", "third")
    assert done.code == 2
    assert "--fp16 and --dtype bfloat16" in done.err


@pytest.mark.parametrize(
    ("script", "flags", "scale"),
    [
        ("main", ["--fp16"], 128.0),
        ("main", [], 1.0),
        ("main", ["--fp16", "--static-loss-scale", "1024"], 1024.0),
        ("main", ["--static-loss-scale", "0.5"], 0.5),
        ("main_fp16_optimizer", ["--fp16"], 128.0),
        ("main_fp16_optimizer", [], 1.0),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"], 2.0**16),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale", "--static-loss-scale", "8"], 2.0**16),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale", "--init-scale", "512"], 512.0),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale", "--init-scale", str(2.0**30)], 2.0**30),
        ("main_amp", ["--init-scale", "512"], 512.0),
        ("main_amp", ["--init-scale", str(2.0**30)], 2.0**30),
        ("main_amp", ["--static-loss-scale", "64"], 64.0),
        ("main_amp", ["--dtype", "bfloat16", "--static-loss-scale", "64"], 64.0),
    ],
)
def test_loss_scale_at_the_start(programs, script, flags, scale):
    assert programs.train(script, "--dry-run", *flags).steps[0]["loss_scale"] == scale


@pytest.mark.parametrize("script", ["main_fp16_optimizer", "main_amp"])
def test_scale_window(programs, script):
    run = programs.train(script, *HALF[script], "--init-scale", "16", "--scale-window", "3", "--max-steps", "8")
    assert [row["loss_scale"] for row in run.steps] == [16.0] * 3 + [32.0] * 3 + [64.0] * 2


@pytest.mark.parametrize("script", ["main", "main_amp"])
def test_a_static_scale_stays(programs, script):
    flags = ["--fp16", "--static-loss-scale", "16", "--max-steps", "6"]
    assert {row["loss_scale"] for row in programs.train(script, *flags).steps} == {16.0}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@every_half
def test_every_kind_of_layer(programs, script, flags, kind, tied):
    flags = [*flags, "--lr", "0.5"] if kind == "Transformer" else flags  # at 20 it overflows
    run = programs.train(script, *flags, "--max-steps", "3", "--model", kind, *(["--tied"] if tied else []))
    assert all(row["applied"] for row in run.steps)
    assert run.config["precision"]["dtypes"]["logits"] == "float16"
    assert run.config["precision"]["dtypes"].get("hidden") == (None if kind == "Transformer" else "float16")
    model, _ = load_model(programs.folder / "model.safetensors")
    assert (model.options["kind"], model.options["tied"]) == (kind, tied)
    gates = {"LSTM": 4, "GRU": 3}.get(kind, 1)
    decoder = 24 if tied else 8 * 24 + 24
    layer = 6 * 8 * 8 + 10 * 8 if kind == "Transformer" else gates * 8 * 18
    assert run.config["parameters"] == 24 * 8 + 2 * layer + decoder


@pytest.mark.parametrize("nlayers", ["1", "3"])
@every_half
def test_layers(programs, script, flags, nlayers):
    programs.train(
        script, *flags, "--dry-run", "--nlayers", nlayers, "--emsize", "5", "--nhid", "7", "--dropout", "0.5"
    )
    model, _ = load_model(programs.folder / "model.safetensors")
    assert (model.rnn.num_layers, model.rnn.input_size, model.rnn.hidden_size) == (int(nlayers), 5, 7)


@every_script
def test_deterministic(programs, script):
    run = programs.train(script, "--dry-run", "--deterministic")
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.utils.deterministic.fill_uninitialized_memory  # of 93 MB of logits in each step
    assert run.config["options"]["deterministic"] is True


@every_script
@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_device_cpu(programs, script, device):
    assert programs.train(script, "--dry-run", *HALF[script], "--device", device).config["options"]["device"] == device


@every_script
def test_dropout_acts_in_training_alone(programs, script):
    """In one layer there is nothing between layers; what is dropped then are embeddings and output."""
    first = {}
    for dropout in ("0", "0.6"):
        flags = ["--dry-run", "--nlayers", "1", "--dropout", dropout, "--lr", "1e-9", "--run-dir", dropout]
        assert programs.run(script, *TINY, *flags).code == 0
        run = read_run(programs.folder / dropout)
        first[dropout] = run.steps[0]["loss"], round(run.result["test_loss"], 5)
    assert first["0"][0] != first["0.6"][0]
    assert first["0"][1] == first["0.6"][1]
