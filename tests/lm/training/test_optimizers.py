"""--optimizer: AdamW in every mode, against torch's own, over skipped steps and over a resume."""

import copy
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from test_oracle import BATCH, BPTT, CLIP, PlainLSTM, history
from test_precision import everything, make, optimizer_state, step

import jobs
from lm.data.corpus import Corpus, batchify, get_batch
from lm.options.config import parse_args
from lm.training.checkpoint import FORMAT
from programs import BATCHES, HALF, SCRIPTS, TINY
from roundoff.errors import UsageError
from roundoff.precision import MasterWeights
from roundoff.runs.tensor_file import load_tensors, save_tensors
from runs import kill_at, outcome, resume

__all__ = ["make"]  # a fixture

STATIC = ["fp32", "manual", "fp16-optimizer-fp32", "fp16-optimizer", "amp-fp16-static", "amp-bf16", "amp-fp32"]
FP32 = {"main": [], "main_fp16_optimizer": [], "main_amp": ["--dtype", "float32"]}


@pytest.mark.parametrize("script", SCRIPTS)
def test_flags(script) -> None:
    def chosen(*flags: str) -> tuple[str, float]:
        args = parse_args(f"{script}.py", "", flags)
        return args.optimizer, args.lr

    assert chosen() == chosen("--optimizer", "sgd") == ("sgd", 20.0)
    assert chosen("--optimizer", "adamw") == chosen("--use-optimizer") == ("adamw", 0.001)
    assert chosen("--use-optimizer", "--optimizer", "adamw", "--lr", "0.5") == ("adamw", 0.5)
    with pytest.raises(UsageError, match=r"--use-optimizer \(AdamW\) and --optimizer sgd contradict"):
        chosen("--use-optimizer", "--optimizer", "sgd")


def test_flags_from_a_file(tmp_path) -> None:
    (tmp_path / "x.toml").write_text("use-optimizer = true\n")
    assert parse_args("main.py", "", ["--config", str(tmp_path / "x.toml")]).optimizer == "adamw"


@pytest.mark.parametrize("update", ["optimizer=adamw", "use_optimizer=True"])
def test_under_sacred_the_rate_is_that_of_the_optimizer(programs, update) -> None:
    assert "  lr = 0.001 " in programs.run("main", "print_config", "with", update).out
    assert "  lr = 3 " in programs.run("main", "print_config", "with", update, "lr=3").out
    assert "  lr = 20.0 " in programs.run("main", "print_config").out
    assert "  lr = 5.0 " in programs.run("main", "print_config", "with", "model_type=Transformer").out


def plain_loop(folder: Path, steps: int, scale: float = 0.01) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of ordinary fp32 training."""
    corpus = Corpus(folder)
    torch.manual_seed(1111)
    model = PlainLSTM(corpus.vocab_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=scale, fused=True)
    data, hidden, history = batchify(corpus.train, BATCH, "cpu"), None, []
    for i in range(0, steps * BPTT, BPTT):
        tokens, targets = get_batch(data, i, BPTT)
        optimizer.zero_grad()
        logits, hidden = model(tokens, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        hidden = tuple(h.detach() for h in hidden)
        history.append((loss.item(), norm.item()))
    return history


@pytest.mark.parametrize("script", FP32)
def test_fp32_equals_plain_pytorch_in_every_bit(monkeypatch, tmp_path, corpus, script) -> None:
    flags = ["--use-optimizer", "--lr", "0.01", "--static-loss-scale", "1024", "--max-steps", "60"]
    assert jobs.run(monkeypatch, corpus, tmp_path / "run", script, *FP32[script], *flags) == 0
    assert history(tmp_path / "run") == plain_loop(corpus, 60)


def test_manual_and_fp16_optimizer_agree(monkeypatch, tmp_path, corpus) -> None:
    flags = ["--fp16", "--optimizer", "adamw", "--lr", "0.01", "--static-loss-scale", "1024", "--max-steps", "60"]
    for script in ("main", "main_fp16_optimizer"):
        assert jobs.run(monkeypatch, corpus, tmp_path / script, script, *flags) == 0
    rows = jobs.rows(tmp_path / "main")
    assert rows == jobs.rows(tmp_path / "main_fp16_optimizer")
    assert sum(row["loss"] for row in rows[-10:]) < 0.95 * sum(row["loss"] for row in rows[:10])


@pytest.mark.parametrize("first", [True, False], ids=["first step", "second step"])
@pytest.mark.parametrize("mode", STATIC)
def test_a_skipped_step_leaves_no_trace(make, mode, first) -> None:
    """Not in the moments, nor in the step counts that AdamW corrects them by."""
    flags = ("--optimizer", "adamw", "--lr", "0.01", "--dropout", "0")
    skipped, never = make(mode, *flags), make(mode, *flags)
    if not first:
        step(skipped, 0), step(never, 0)
    step(skipped, 1, inject=("encoder.weight", math.inf))
    step(skipped, 2), step(never, 2)
    assert everything(skipped) == everything(never)
    counts = {float(t) for t in optimizer_state(skipped) if t.dim() == 0}
    assert counts == {1.0 if first else 2.0}


@pytest.mark.parametrize("mode", ["fp16-optimizer-dynamic", "amp-fp16"])
def test_overflow_changes_nothing_but_a_dynamic_scale(make, mode) -> None:
    job = make(mode, "--optimizer", "adamw", "--lr", "0.01")
    step(job, 0)
    before = everything(job)
    result = step(job, 1, inject=("decoder.bias", math.nan))
    assert everything(job) == before
    assert float(step(job, 2).loss_scale) == float(result.loss_scale) / 2
    assert everything(job) != before


@pytest.mark.parametrize("mode", ["fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16"])
def test_a_run_killed_and_resumed(programs, monkeypatch, mode) -> None:
    script, *flags = jobs.MODES[mode]
    flags += [*TINY, "--optimizer", "adamw", "--lr", "0.01", "--checkpoint-interval", "7"]
    flags += jobs.if_dynamic(mode, "--scale-window", "4")
    assert programs.run(script, *flags).code == 0
    expected = outcome(programs.folder)
    Path("run").rename("whole")
    kill_at(programs, BATCHES + 10, script, *flags)
    resume(programs, script)
    assert outcome(programs.folder) == expected


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("exp_avg", torch.zeros(()), "exp_avg has the wrong shape"),
        ("step", torch.zeros(3), "step has the wrong shape"),
        ("step", torch.tensor(3), "step has the wrong shape or type"),
        ("exp_avg_sq", None, "exp_avg_sq has the wrong shape or type"),
        ("max_exp_avg_sq", torch.zeros(()), "the optimizer's buffers are"),
    ],
)
@pytest.mark.parametrize("script", SCRIPTS)
def test_a_hostile_state_never_reaches_the_kernel(programs, script, name, value, said) -> None:
    flags = [*TINY, *HALF[script], "--use-optimizer", "--dry-run"]
    assert programs.run(script, *flags).code == 0
    path = Path("run/checkpoint.safetensors")
    content = load_tensors(path, FORMAT)
    precision = content["precision"]
    state = precision.get("optimizer") or precision["optimizer_state_dict"]
    state["state"][0][name] = value
    save_tensors(path, content, FORMAT)
    assert said in programs.refuse(script, "--resume", "run")
    del state["state"][0][name]
    state["param_groups"][0]["amsgrad"] = True
    save_tensors(path, content, FORMAT)
    assert "amsgrad is True" in programs.refuse(script, "--resume", "run")


def test_fp32_parameters_in_groups_of_another_order() -> None:
    """They are their own masters, in whatever order the optimizer has them."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 3, bias=False), torch.nn.Linear(3, 3, bias=False))
    plain, x = copy.deepcopy(net), torch.randn(5, 3)

    def sgd(of: torch.nn.Sequential) -> torch.optim.SGD:
        return torch.optim.SGD([{"params": of[1].parameters()}, {"params": of[0].parameters(), "lr": 0.01}], lr=0.1)

    precision, optimizer = MasterWeights(net.parameters(), sgd(net)), sgd(plain)
    for _ in range(3):
        net.zero_grad()
        precision.backward(net(x).square().mean())
        assert precision.step(math.inf).applied
        plain.zero_grad()
        plain(x).square().mean().backward()
        optimizer.step()
    assert [torch.equal(a, b) for a, b in zip(net.parameters(), plain.parameters(), strict=True)] == [True, True]
