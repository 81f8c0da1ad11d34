"""Steps with a non-finite loss or gradient: none reaches a weight, each is counted, too many end the run."""

import math

import pytest
import torch

from checkpoints import saved_weights
from programs import BATCHES, HALF, SCRIPTS, TINY, read_run

every_script = pytest.mark.parametrize("script", SCRIPTS)
MODES = {
    "main": ["main", []],
    "main-fp16": ["main", ["--fp16"]],
    "fp16_optimizer": ["main_fp16_optimizer", []],
    "fp16_optimizer-static": ["main_fp16_optimizer", ["--fp16"]],
    "fp16_optimizer-dynamic": ["main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"]],
    "amp-float16": ["main_amp", []],
    "amp-bfloat16": ["main_amp", ["--dtype", "bfloat16"]],
    "amp-float32": ["main_amp", ["--dtype", "float32"]],
}
every_mode = pytest.mark.parametrize(("script", "flags"), MODES.values(), ids=MODES)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@every_mode
def test_divergence(programs, script, flags, value):
    """Bad from step 5 on: the weights stay as step 4 left them, and the end is told."""
    models = programs.spoil_gradients(set(range(5, 99)), "rnn.bias_hh_l1", value)
    done = programs.run(script, *TINY, *flags, "--max-skipped", "4", "--log-interval", "4")
    assert (done.code, done.err.count("\n")) == (1, 1)
    run = read_run(programs.folder / "run", done.out)
    assert [row["applied"] for row in run.steps] == [True] * 4 + [False] * 4
    result = run.result
    assert (result["status"], result["steps"], result["skipped"]) == ("diverged", 8, 4)
    assert (result["test_loss"], result["test_ppl"]) == (None, None)
    assert {row["grad_norm"] for row in run.steps[4:]} <= {"inf", "nan"}
    assert all(math.isfinite(row["loss"]) for row in run.steps)
    assert len({row["loss"] for row in run.steps[4:]}) > 1  # different batches
    assert all(weight.isfinite().all() for weight in models[0].state_dict().values())

    scale = run.steps[-1]["loss_scale"]
    for told in (run.config["mode"], f"loss scale {scale:g}", "rnn.bias_hh_l1", "4 steps in a row", "--lr"):
        assert told in done.err
    assert "End of training" not in done.out
    assert not (programs.folder / "model.safetensors").exists()


@every_mode
def test_a_skipped_step_changes_no_weight(programs, script, flags):
    before = []
    programs.before_training(lambda model: before.append({n: w.clone() for n, w in model.state_dict().items()}))
    models = programs.spoil_gradients(set(range(1, 99)), "decoder.bias")
    assert programs.run(script, *TINY, *flags, "--max-skipped", "3").code == 1
    for name, weight in models[0].state_dict().items():
        assert torch.equal(weight, before[0][name]), name


def test_what_to_try_fits_the_mode(programs):
    programs.spoil_gradients(set(range(1, 99)), "decoder.bias")
    tried = {}
    for name, (script, flags) in MODES.items():
        err = programs.run(script, *TINY, *flags, "--max-skipped", "1", "--run-dir", name).err
        tried[name] = err.partition("; try ")[2]
    assert all("--lr" in advice for advice in tried.values())
    half = {"main-fp16", "fp16_optimizer-static", "fp16_optimizer-dynamic", "amp-float16"}
    assert {name for name, advice in tried.items() if "bfloat16" in advice} == half
    assert {name for name, advice in tried.items() if "dynamic" in advice} == {"main-fp16", "fp16_optimizer-static"}
    assert "--dynamic-loss-scale" in tried["fp16_optimizer-static"]  # this very script has it


@pytest.mark.parametrize("script", ["main", "main_fp16_optimizer"])
def test_a_static_scale_out_of_fp16s_range_diverges(programs, script):
    done = programs.run(script, *TINY, "--fp16", "--static-loss-scale", "1e38", "--max-skipped", "5")
    assert done.code == 1
    assert "loss scale 1e+38" in done.err
    assert "--static-loss-scale" in done.err
    run = read_run(programs.folder / "run")
    assert [row["applied"] for row in run.steps] == [False] * 5


@pytest.mark.parametrize("script", ["main_fp16_optimizer", "main_amp"])
def test_a_dynamic_scale_finds_its_way_down(programs, script):
    """With 2^24 the first steps overflow: as many are skipped as halvings are needed, and the run goes on."""
    run = programs.train(script, *HALF[script], "--init-scale", str(2.0**24), "--log-interval", "4")
    assert sum(not row["applied"] for row in run.steps) == run.result["skipped"]
    assert not any(row["applied"] for row in run.steps[:4])
    assert all(row["applied"] for row in run.steps[-BATCHES:])
    scale = 2.0**24
    for row in run.steps:
        assert row["loss_scale"] == scale
        scale *= 1.0 if row["applied"] else 0.5
    assert run.out.splitlines()[0].endswith(f" | skipped 4 | loss scale {2**21:g}")


@every_script
def test_a_learning_rate_that_blows_up(programs, script):
    """Weights near 1e38 give a loss that is inf, be the gradients finite or not: no mode goes on with that for ever."""
    flags = ["--lr", "1e38", "--clip", "inf", "--max-skipped", "6", "--dropout", "0"]
    done = programs.run(script, *TINY, *flags, *(["--dtype", "float32"] if script == "main_amp" else []))
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"]) == (1, "diverged")
    assert len(run.steps) < BATCHES
    assert {row["loss"] for row in run.steps[-6:] if row["applied"]} <= {"inf", "nan"}


@pytest.mark.parametrize("log_interval", ["1", "3", "4", "5", "200"])
@every_script
def test_one_step_short_of_max_skipped_goes_on(programs, script, log_interval):
    """3 bad, 1 good, 3 bad, ... never 4 in a row, over the ends of epochs too."""
    steps = 2 * BATCHES
    bad = {step for step in range(1, steps + 1) if step % 4 != 0}
    models = programs.spoil_gradients(bad, "encoder.weight")
    flags = [*HALF[script], "--max-skipped", "4", "--log-interval", log_interval, "--epochs", "2"]
    run = programs.train(script, *flags)
    assert [row["step"] for row in run.steps if not row["applied"]] == sorted(bad)
    assert (run.result["status"], run.result["skipped"], run.result["steps"]) == ("finished", len(bad), steps)
    assert all(weight.isfinite().all() for weight in models[0].state_dict().values())


@pytest.mark.parametrize("log_interval", ["1", "3", "200"])
@pytest.mark.parametrize("first", [1, 3, BATCHES - 1])
@every_script
def test_max_skipped_in_a_row_ends_the_run(programs, script, log_interval, first):
    """Wherever the bad steps lie, and although good ones follow, the line names step, scale and parameter."""
    programs.spoil_gradients(set(range(first, first + 4)), "rnn.weight_hh_l1")
    flags = [*HALF[script], "--max-skipped", "4", "--log-interval", log_interval, "--epochs", "2"]
    done = programs.run(script, *TINY, *flags)
    assert done.code == 1
    run = read_run(programs.folder / "run")
    assert run.result["status"] == "diverged"
    assert run.result["steps"] == len(run.steps)
    assert [row["step"] for row in run.steps if not row["applied"]] == list(range(first, first + 4))
    assert f"up to step {first + 3}" in done.err
    assert f"loss scale {run.steps[first + 2]['loss_scale']:g}" in done.err
    assert "rnn.weight_hh_l1" in done.err


def test_a_diverged_run_keeps_the_model_of_an_earlier_epoch(programs):
    programs.spoil_gradients(set(range(BATCHES + 1, 99)), "decoder.bias")
    done = programs.run("main", *TINY, "--max-skipped", "4", "--epochs", "2")
    run = read_run(programs.folder / "run")
    assert (done.code, len(run.epochs)) == (1, 1)
    saved = saved_weights(programs.folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in saved.values())
    # 18 batches of the first epoch, and those of the second one that ran before its end
    assert run.result["tokens_per_second"] > 0
