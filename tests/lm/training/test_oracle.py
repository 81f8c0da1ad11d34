"""The trainers against a plain PyTorch loop, and against each other, bit by bit."""

import copy
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler

import jobs
from jobs import on
from lm.data.corpus import Corpus, batchify, get_batch
from lm.model.model_file import load_model
from lm.training.checkpoint import FILE
from programs import TINY, strict_json, write_corpus
from ranks import torchrun
from roundoff.precision import MasterWeights, StepResult
from runs import outcome, state_bits

STEPS = 100
BATCH, BPTT, SIZE, LR, CLIP, DROPOUT = 4, 5, 16, 2.0, 0.25, 0.2


class PlainLSTM(nn.Module):
    """The model of the PyTorch example, written once more and independently of lm.model.language_model."""

    def __init__(self, ntokens: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.encoder = nn.Embedding(ntokens, SIZE)
        self.rnn: Any = self.layers()
        self.decoder = nn.Linear(SIZE, ntokens)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def layers(self) -> nn.Module:
        return nn.LSTM(SIZE, SIZE, 2, dropout=DROPOUT)

    def features(self, embedded: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        return self.rnn(embedded, hidden)

    def forward(self, tokens: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        output, hidden = self.features(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)), hidden


class PlainLayers(PlainLSTM):
    """The same layer by layer: a GPU draws what nn.LSTM drops between layers from a state of cuDNN's own."""

    def layers(self) -> nn.Module:
        return nn.ModuleList(nn.LSTM(SIZE, SIZE) for _ in range(2))

    def features(self, embedded: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        first, second = (None, None) if hidden is None else (hidden[:2], hidden[2:])
        between, first = self.rnn[0](embedded, first)
        output, second = self.rnn[1](self.drop(between), second)
        return output, (*first, *second)


class PlainTransformer(nn.Module):
    """The other model of the PyTorch example, with a mask in full and positions from a loop."""

    def __init__(self, ntokens: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.encoder = nn.Embedding(ntokens, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, 4, 24, DROPOUT)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.decoder = nn.Linear(SIZE, ntokens)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        embedded = self.encoder(tokens) * SIZE**0.5
        mask = nn.Transformer.generate_square_subsequent_mask(len(tokens), device=tokens.device)
        table = plain_positions(len(tokens)).to(tokens.device)
        return self.decoder(self.layers(self.drop(embedded + table), mask)), ()


def plain_positions(words: int) -> Tensor:
    rates = torch.exp(torch.arange(0, SIZE, 2).float() * (-math.log(10000.0) / SIZE))
    table = torch.zeros(words, 1, SIZE)
    table[:, 0, 0::2] = torch.sin(torch.arange(words).float()[:, None] * rates)
    table[:, 0, 1::2] = torch.cos(torch.arange(words).float()[:, None] * rates)
    return table


TRANSFORMER = ["--model", "Transformer", "--nhead", "4", "--nhid", "24"]


Rows = list[tuple[float, float]]
"""Loss and gradient norm of each step."""


def plain_start(corpus: Corpus, device: str, kind: type[nn.Module], lr: float) -> tuple[nn.Module, torch.optim.SGD]:
    torch.manual_seed(1111)
    model = kind(corpus.vocab_size).to(device)
    # On a GPU the trainers' fused kernel is the reference: how SGD rounds there is torch's choice of kernel.
    return model, torch.optim.SGD(model.parameters(), lr=lr, fused=device == "cuda")


def plain_epoch(model: nn.Module, optimizer: torch.optim.SGD, data: Tensor) -> Iterator[tuple[float, float]]:
    """Take the steps of one pass of ordinary fp32 training."""
    model.train()
    hidden = None
    for i in range(0, len(data) - 1, BPTT):
        tokens, targets = get_batch(data, i, BPTT)
        optimizer.zero_grad()
        logits, hidden = model(tokens, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        hidden = tuple(h.detach() for h in hidden)
        yield loss.item(), norm.item()


def plain_loop(
    folder: Path, device: str, kind: type[nn.Module] = PlainLSTM, rates: Sequence[float] = (LR,) * STEPS
) -> Rows:
    """The first steps, at these learning rates."""
    corpus = Corpus(folder)
    model, optimizer = plain_start(corpus, device, kind, LR)
    steps, history = plain_epoch(model, optimizer, batchify(corpus.train, BATCH, device)), []
    for rate in rates:
        optimizer.param_groups[0]["lr"] = rate
        history.append(next(steps))
    return history


@torch.no_grad()
def plain_test(model: nn.Module, data: Tensor) -> float:
    """The mean over all words: each batch's fp32 mean by its number of words, summed without rounding."""
    model.eval()
    hidden, sums = None, []
    for i in range(0, len(data) - 1, BPTT):
        tokens, targets = get_batch(data, i, BPTT)
        logits, hidden = model(tokens, hidden)
        sums.append(Fraction(F.cross_entropy(logits.flatten(0, 1), targets).item()) * len(targets))
    return float(sum(sums) / (len(data) - 1) / data.size(1))


class PlainRun(NamedTuple):
    steps: Rows
    valid: list[float]
    test: float


def plain_run(folder: Path, device: str, kind: type[nn.Module], lr: float, epochs: int) -> PlainRun:
    """Whole epochs: the best model is kept and tested, and the rate falls to a quarter where an epoch is no better."""
    corpus = Corpus(folder)
    model, optimizer = plain_start(corpus, device, kind, lr)
    train, valid, test = (
        batchify(text, size, device) for text, size in ((corpus.train, BATCH), (corpus.valid, 10), (corpus.test, 10))
    )
    steps: Rows = []
    losses: list[float] = []
    best: dict[str, Tensor] = {}
    for _ in range(epochs):
        steps += plain_epoch(model, optimizer, train)
        loss = plain_test(model, valid)
        if loss < min(losses, default=math.inf):
            best = copy.deepcopy(model.state_dict())
        else:
            optimizer.param_groups[0]["lr"] /= 4
        losses.append(loss)
    model.load_state_dict(best)
    return PlainRun(steps, losses, plain_test(model, test))


@pytest.fixture
def train(monkeypatch, tmp_path, corpus) -> Callable[..., Path]:
    """Runs a script into a directory of that name, which it returns."""

    def run(name: str, script: str, *flags: str) -> Path:
        assert jobs.run(monkeypatch, corpus, tmp_path / name, script, *flags) == 0
        return tmp_path / name

    return run


def history(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in jobs.rows(run_dir)]


FP32 = {"main": [], "main_fp16_optimizer": [], "main_amp": ["--dtype", "float32"]}


PLAIN = {"LSTM": (PlainLSTM, [], 1024.0), "LSTM, scale 1, layer by layer": (PlainLayers, [], 1.0)}
PLAIN["Transformer"] = (PlainTransformer, TRANSFORMER, 1024.0)


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("script", FP32)
def test_fp32_equals_plain_pytorch_in_every_bit(train, corpus, device, script, case) -> None:
    kind, flags, scale = PLAIN[case]
    if device == "cuda" and kind is PlainLSTM:
        kind = PlainLayers
    run = train(
        "run", script, *FP32[script], *flags, f"--static-loss-scale={scale}", f"--max-steps={STEPS}", *on(device)
    )
    steps = jobs.rows(run)
    assert {row["loss_scale"] for row in steps} == {scale}
    assert history(run) == plain_loop(corpus, device, kind)
    assert len(steps) == STEPS
    assert sum(row["loss"] for row in steps[-20:]) < 0.96 * sum(row["loss"] for row in steps[:20])


@pytest.mark.parametrize("epochs", jobs.mostly_slow([2, 3], 3))
@pytest.mark.parametrize("script", jobs.mostly_slow(FP32, "main"))
def test_whole_epochs_equal_plain_pytorch_in_every_bit(train, tmp_path, device, script, epochs) -> None:
    """Validation and test too; the last batch of each text is short. The first epoch of two is the best."""
    kind = PlainLayers if device == "cuda" else PlainLSTM
    corpus = write_corpus(tmp_path / "text", train=40, valid=30, test=24)
    run = train("run", script, *FP32[script], f"--data={corpus}", "--lr=45", f"--epochs={epochs}", *on(device))
    expected = plain_run(corpus, device, kind, 45.0, epochs)
    assert (expected.valid[1] > expected.valid[0], min(expected.valid) == expected.valid[-1]) == (True, epochs == 3)
    assert history(run) == expected.steps
    assert [row["valid_loss"] for row in jobs.rows(run, "epochs.jsonl")] == expected.valid
    assert strict_json((run / "result.json").read_text())["test_loss"] == expected.test


def test_a_scale_that_is_no_power_of_two_rounds(train, corpus) -> None:
    assert history(train("run", "main", "--static-loss-scale=1000", f"--max-steps={STEPS}")) != plain_loop(
        corpus, "cpu"
    )


SCHEDULES: dict[str, tuple[str, list[str], Callable[[Any], list[LRScheduler]]]] = {
    "anneal, warmup": ("main", ["--warmup", "9"], lambda o: [LinearLR(o, 1 / 9, 1.0, 8)]),
    "constant": ("main_amp", ["--lr-schedule", "constant"], lambda o: []),
    "cosine": ("main_fp16_optimizer", ["--lr-schedule", "cosine"], lambda o: [CosineAnnealingLR(o, 30)]),
    "cosine, warmup": (
        "main_amp",
        ["--lr-schedule", "cosine", "--warmup", "9"],
        lambda o: [LinearLR(o, 1 / 9, 1.0, 8), CosineAnnealingLR(o, 30)],
    ),
}


@pytest.mark.parametrize("case", SCHEDULES)
def test_a_schedule_is_that_of_torch(train, corpus, case) -> None:
    """The rates that are recorded, and those that the steps take."""
    script, flags, of_torch = SCHEDULES[case]
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=LR)
    schedulers, expected = of_torch(optimizer), []
    for _ in range(30):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
    run = train("run", script, *FP32[script], *flags, "--max-steps=30")
    rates = [row["lr"] for row in jobs.rows(run)]
    assert rates == pytest.approx(expected, rel=1e-12)
    assert history(run) == plain_loop(corpus, "cpu", rates=rates)


PARTS = {  # -> relative error of a loss at the first step and after 20, of a weight after 20
    "fp32": (2e-7, 1e-6, 2e-6),
    "manual": (2e-4, 5e-4, 3e-3),
    "fp16-optimizer-dynamic": (2e-4, 5e-4, 3e-3),
    "amp-fp16": (2e-4, 5e-4, 3e-3),
    "amp-bf16": (2e-3, 4e-3, 2e-2),
}


@pytest.mark.parametrize("mode", jobs.mostly_slow(PARTS, "fp32", "manual", "amp-bf16"))
def test_the_parts_of_a_batch_train_what_the_whole_trains(train, mode) -> None:
    """Without dropout, of which each part draws its own. Three parts of four columns have 2, 1 and 1."""
    flags = [*jobs.MODES[mode], "--dropout=0", "--max-steps=20"]
    whole, parts = train("whole", *flags), train("parts", *flags, "--accumulate=3")
    errors = [abs(a["loss"] / b["loss"] - 1) for a, b in zip(jobs.rows(parts), jobs.rows(whole), strict=True)]
    weights = [load_model(Path(f"{run}.pt"))[0].state_dict() for run in (parts, whole)]
    moved = max(float((weights[0][n] - w).abs().max() / w.abs().max()) for n, w in weights[1].items())
    first, last, weight = PARTS[mode]
    assert errors[0] <= first
    assert 0 < max(errors) <= last, "rounding alone differs, and it does"
    assert 0 < moved <= weight


class ClipsScaledGradients(MasterWeights):  # type: ignore[misc]
    """The mistake of clipping first and unscaling afterwards."""

    def step(self, max_norm: float) -> StepResult:
        norm = nn.utils.clip_grad_norm_(self._masters, max_norm)
        torch._foreach_mul_([m.grad for m in self._masters], self._inverse_scale)
        self.optimizer.step()
        return StepResult(norm.isfinite(), norm * self._inverse_scale, self._loss_scale)


def test_clipping_before_unscaling_is_caught(train, monkeypatch, corpus) -> None:
    monkeypatch.setattr("main.MasterWeights", ClipsScaledGradients)
    mutant, plain = (
        history(train("run", "main", "--static-loss-scale=1024", "--max-steps=5")),
        plain_loop(corpus, "cpu"),
    )
    assert mutant[0] == plain[0]  # the first gradient is right ...
    assert mutant[1] != plain[1]  # ... and what was made of it is not


JOBS = {"LSTM": [], "GRU tied": ["--model", "GRU", "--tied"], "Transformer": TRANSFORMER}
JOBS |= {kind: ["--model", kind] for kind in ("GRU", "RNN_TANH", "RNN_RELU")}
ADAMW = ["--optimizer", "adamw", "--lr", "0.01"]
JOBS |= {"LSTM, AdamW": ADAMW, "Transformer, AdamW": [*TRANSFORMER, *ADAMW]}


@pytest.mark.parametrize("scale", jobs.mostly_slow(["128", "8192"], "128"))
@pytest.mark.parametrize("job", jobs.mostly_slow(JOBS, "LSTM", "RNN_RELU", "Transformer", "LSTM, AdamW"))
def test_manual_and_fp16_optimizer_agree_over_a_whole_run(train, request, device, scale, job) -> None:
    """Steps, validations, result and model; quick over 100 steps."""
    length = ["--epochs", "2"] if request.config.getoption("--slow") else ["--max-steps", str(STEPS)]
    flags = ["--fp16", *JOBS[job], "--static-loss-scale", scale, *length, *on(device)]
    manual, wrapped = (train(script, script, *flags) for script in ("main", "main_fp16_optimizer"))
    assert len(jobs.rows(manual)) >= STEPS
    left = [outcome(run.parent, run.name, f"{run.name}.pt") for run in (manual, wrapped)]
    assert left[0] == left[1]


@pytest.mark.parametrize("job", jobs.mostly_slow(JOBS, "GRU tied"))
@pytest.mark.parametrize("pair", [("apex-o2", "fp16-optimizer-dynamic"), ("apex-o1", "amp-fp16")])
def test_a_level_of_apex_is_its_successor_over_a_whole_run(train, device, job, pair) -> None:
    """Steps with overflows and growth, validation, test loss and model, of which O2 saves the masters."""
    flags = [*JOBS[job], "--init-scale", str(2.0**20), "--scale-window", "8", "--max-steps", "40", *on(device)]
    apex, other = (train(mode, *jobs.MODES[mode], *flags) for mode in pair)
    applied = [row["applied"] for row in jobs.rows(apex)]
    assert not all(applied)
    assert sum(applied) > 20
    keep = ("loss", "grad_norm", "loss_scale", "applied", "lr", "valid_loss")
    for name in ("steps.jsonl", "epochs.jsonl"):
        rows = [[[row.get(key) for key in keep] for row in jobs.rows(run, name)] for run in (apex, other)]
        assert rows[0] == rows[1]
    models = [load_model(Path(f"{run}.pt"))[0].state_dict().values() for run in (apex, other)]
    half = pair[0] == "apex-o2"
    assert jobs.bits([w.half() if half else w for w in models[0]]) == jobs.bits(
        [w.half() if half else w for w in models[1]]
    )


@pytest.mark.slow
def test_torchrun_with_one_process_is_the_plain_run(programs, device) -> None:
    flags = [*TINY, "--fp16", "--dropout", "0.2", "--checkpoint-interval", "5", *on(device)]
    assert programs.run("main", *flags).code == 0
    plain = outcome(programs.folder), state_bits(programs.folder / "run" / FILE)
    shutil.rmtree("run")
    ended = torchrun(programs.folder, "main", *flags, processes=1)
    assert ended.codes == [0], ended
    assert (outcome(programs.folder), state_bits(programs.folder / "run" / FILE)) == plain


LEARNS = {mode: (mode, []) for mode in jobs.MODES} | {
    f"Transformer {mode}": (mode, [*TRANSFORMER, "--lr", "0.5"]) for mode in ("manual", "amp-fp16", "amp-bf16")
}


@pytest.mark.parametrize("case", jobs.mostly_slow(LEARNS, "fp32", "amp-fp16"))
def test_every_mode_repeats_itself_and_learns(train, case) -> None:
    mode, flags = LEARNS[case]
    first, second = (jobs.rows(train(name, *jobs.MODES[mode], "--max-steps=120", *flags)) for name in ("a", "b"))
    assert first == second
    losses = [row["loss"] for row in first if row["applied"]]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
