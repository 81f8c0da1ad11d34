"""The README's commands as a GPU runs them, and what only a GPU has: TF32, and sums of half products in half."""

import subprocess

import pytest
import torch

import jobs
from lm.options.modes import FP32
from programs import TINY, start
from roundoff.device import tf32_allowed
from switches import CUBLAS, HALF_SUMS

COMMANDS = {
    " ".join(command): command
    for command in (
        ["main"],
        ["main", "--fp16"],
        ["main", "--fp16", "--model", "Transformer"],
        ["main_fp16_optimizer", "--fp16"],
        ["main_fp16_optimizer", "--fp16", "--dynamic-loss-scale"],
        ["main_fp16_optimizer", "--fp16", "--dynamic-loss-scale", "--optimizer", "adamw"],
        ["main_amp"],
        ["main_amp", "--dtype", "bfloat16"],
        ["main_amp", "--dtype", "bfloat16", "--model", "GRU", "--lr", "5"],
        ["main_amp", "--dtype", "bfloat16", "--model", "Transformer", "--optimizer", "adamw"],
    )
}
SIZES = {  # on a GPU those of the README
    "cpu": ["--emsize", "32", "--nhid", "32", "--batch_size", "20", "--bptt", "10"],
    "cuda": ["--emsize", "200", "--nhid", "200", "--batch_size", "20", "--bptt", "35"],
}


@pytest.mark.parametrize("name", jobs.mostly_slow(COMMANDS, "main_amp --dtype bfloat16"))
def test_readme_commands(programs, device, name) -> None:
    script, *flags = COMMANDS[name]
    where = ["--device", device, "--data", "python-docs", "--max-steps", "60"]
    run = programs.train(script, *flags, *SIZES[device], *where)
    precision, result = run.config["precision"], run.result
    assert run.config["options"]["device"] == device
    assert precision["dtypes"]["logits"] == precision["dtypes"].get("hidden", precision["dtype"]) == precision["dtype"]
    assert result["status"] == "finished"
    assert result["skipped"] < 10
    assert result["test_ppl"] < 1000  # of 2,200 words
    assert result["peak_memory_bytes"] > 1_000_000


@pytest.mark.cuda
def test_tf32_when_it_is_asked_for_alone(programs) -> None:
    """Where it is allowed fp32 modes still agree in every bit, and are near to those without it."""
    runs = {}
    for tf32 in ([], ["--tf32"]):
        for mode in FP32:
            script, *flags = jobs.MODES[mode]
            job = [*jobs.on("cuda"), *SIZES["cuda"], "--lr", "1", "--max-steps", "20"]
            run = programs.train(script, *flags, *tf32, *job, name=f"run {mode} {tf32}")
            assert run.config["environment"]["tf32"] == tf32_allowed() == bool(tf32)
            runs[mode, bool(tf32)] = [(row["loss"], row["grad_norm"]) for row in run.steps]
    for tf32 in (False, True):
        assert runs[FP32[0], tf32] == runs[FP32[1], tf32] == runs[FP32[2], tf32]
    for exact, rounded in zip(runs[FP32[0], False], runs[FP32[0], True], strict=True):
        assert rounded == pytest.approx(exact, rel=0.05)


@pytest.mark.cuda
@pytest.mark.parametrize("mode", ["manual", "amp-fp16", "amp-bf16"])
def test_sums_of_half_products_are_fp32(programs, mode) -> None:
    """Also where a GPU splits a long sum, as that over 33,280 words: its halves here are inf and -inf in fp16."""
    script, *flags = jobs.MODES[mode]
    environment = programs.train(script, *flags, "--cuda", "--dry-run").config["environment"]
    assert [value for name, value in environment.items() if "reduced" in name] == [False]
    assert [getattr(place, name) for place, name in HALF_SUMS] == [False, False]
    gradient = torch.full((700, 33_280), 8.0, dtype=torch.float16, device="cuda")
    gradient[:, 33_280 // 2 :] = -8.0
    assert not (gradient @ torch.ones((33_280, 200), dtype=torch.float16, device="cuda")).any()


@pytest.mark.cuda
def test_a_deterministic_run_sets_cublas_up_by_itself(programs, monkeypatch) -> None:
    """In a process of its own: in this one it is set up already."""
    monkeypatch.delenv(CUBLAS)
    flags = [*TINY, "--dry-run", "--deterministic", "--cuda"]
    process = start(programs.folder, "main", *flags, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
