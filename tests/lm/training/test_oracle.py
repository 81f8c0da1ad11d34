"""The trainers against a plain PyTorch loop, and against each other, bit by bit."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import jobs
from checkpoints import saved_weights
from lm.data.corpus import Corpus, batchify, get_batch
from lm.options.modes import DEFAULT_MODES
from roundoff.precision import MasterWeights, StepResult

STEPS = 100
BATCH, BPTT, SIZE, LR, CLIP, DROPOUT = 4, 5, 16, 2.0, 0.25, 0.2


class PlainLSTM(nn.Module):
    """The model of the PyTorch example, written once more and independently of lm.model.language_model."""

    def __init__(self, ntokens: int) -> None:
        super().__init__()
        self.drop = nn.Dropout(DROPOUT)
        self.encoder = nn.Embedding(ntokens, SIZE)
        self.rnn = nn.LSTM(SIZE, SIZE, 2, dropout=DROPOUT)
        self.decoder = nn.Linear(SIZE, ntokens)
        nn.init.uniform_(self.encoder.weight, -0.1, 0.1)
        nn.init.zeros_(self.decoder.bias)
        nn.init.uniform_(self.decoder.weight, -0.1, 0.1)

    def forward(self, tokens: Tensor, hidden: Any) -> tuple[Tensor, Any]:
        output, hidden = self.rnn(self.drop(self.encoder(tokens)), hidden)
        return self.decoder(self.drop(output)), hidden


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


def plain_loop(folder: Path, device: str, kind: type[nn.Module] = PlainLSTM) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of ordinary fp32 training."""
    corpus = Corpus(folder)
    torch.manual_seed(1111)
    model = kind(corpus.vocab_size).to(device)
    # On a GPU the trainers' fused kernel is the reference: how SGD rounds there is torch's choice of kernel.
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, fused=device == "cuda")
    data = batchify(corpus.train, BATCH, device)
    hidden = None
    history = []
    for i in range(0, len(data) - 1, BPTT):
        tokens, targets = get_batch(data, i, BPTT)
        optimizer.zero_grad()
        logits, hidden = model(tokens, hidden)
        loss = F.cross_entropy(logits.flatten(0, 1), targets)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        hidden = tuple(h.detach() for h in hidden)
        history.append((loss.item(), norm.item()))
        if len(history) == STEPS:
            break
    return history


def history(run_dir: Path) -> list[tuple[float, float]]:
    return [(row["loss"], row["grad_norm"]) for row in jobs.rows(run_dir)]


FP32 = {"main": [], "main_fp16_optimizer": [], "main_amp": ["--dtype", "float32"]}


@pytest.mark.parametrize("scale", ["1", "1024"])
@pytest.mark.parametrize("script", FP32)
def test_fp32_equals_plain_pytorch_in_every_bit(monkeypatch, tmp_path, corpus, device, script, scale) -> None:
    flags = [*FP32[script], "--static-loss-scale", scale, "--max-steps", str(STEPS), "--device", device]
    if device == "cuda":
        flags += ["--deterministic"]
    assert jobs.run(monkeypatch, corpus, tmp_path / "run", script, *flags) == 0
    steps = jobs.rows(tmp_path / "run")
    assert len(steps) == STEPS
    assert {row["loss_scale"] for row in steps} == {float(scale)}
    assert history(tmp_path / "run") == plain_loop(corpus, device)
    assert sum(row["loss"] for row in steps[-20:]) < 0.95 * sum(row["loss"] for row in steps[:20])


@pytest.mark.parametrize("script", FP32)
def test_a_transformer_in_fp32_equals_plain_pytorch_in_every_bit(monkeypatch, tmp_path, corpus, device, script) -> None:
    flags = [*FP32[script], *TRANSFORMER, "--static-loss-scale", "1024", "--max-steps", "60", "--device", device]
    if device == "cuda":
        flags += ["--deterministic"]
    assert jobs.run(monkeypatch, corpus, tmp_path / "run", script, *flags) == 0
    assert history(tmp_path / "run") == plain_loop(corpus, device, PlainTransformer)[:60]


def test_a_transformer_in_fp16_is_the_same_by_hand_and_through_fp16_optimizer(monkeypatch, tmp_path, corpus) -> None:
    flags = ["--fp16", *TRANSFORMER, "--static-loss-scale", "1024", "--epochs", "1"]
    for script in ("main", "main_fp16_optimizer"):
        assert jobs.run(monkeypatch, corpus, tmp_path / script, script, *flags) == 0
    assert jobs.rows(tmp_path / "main") == jobs.rows(tmp_path / "main_fp16_optimizer")


def test_a_scale_that_is_no_power_of_two_rounds(monkeypatch, tmp_path, corpus) -> None:
    flags = ["--static-loss-scale", "1000", "--max-steps", str(STEPS)]
    jobs.run(monkeypatch, corpus, tmp_path / "run", "main", *flags)
    assert history(tmp_path / "run") != plain_loop(corpus, "cpu")


class ClipsScaledGradients(MasterWeights):  # type: ignore[misc]
    """The mistake of clipping first and unscaling afterwards."""

    def step(self, max_norm: float) -> StepResult:
        norm = nn.utils.clip_grad_norm_(self._masters, max_norm)
        torch._foreach_mul_([m.grad for m in self._masters], self._inverse_scale)
        self._optimizer.step()
        return StepResult(norm.isfinite(), norm * self._inverse_scale, self._loss_scale)


def test_clipping_before_unscaling_is_caught(monkeypatch, tmp_path, corpus) -> None:
    monkeypatch.setattr("main.MasterWeights", ClipsScaledGradients)
    jobs.run(monkeypatch, corpus, tmp_path / "run", "main", "--static-loss-scale", "1024", "--max-steps", "5")
    mutant, plain = history(tmp_path / "run"), plain_loop(corpus, "cpu")
    assert mutant[0] == plain[0]  # the first gradient is right ...
    assert mutant[1] != plain[1]  # ... and what was made of it is not


@pytest.mark.parametrize("scale", jobs.mostly_slow(["128", "8192"], "128"))
@pytest.mark.parametrize(
    "model", jobs.mostly_slow([["--model", "LSTM"], ["--model", "GRU", "--tied"], TRANSFORMER], ["--model", "LSTM"])
)
def test_manual_and_fp16_optimizer_agree_over_a_whole_run(monkeypatch, tmp_path, corpus, device, scale, model) -> None:
    flags = ["--fp16", *model, "--static-loss-scale", scale, "--epochs", "2", "--device", device]
    if device == "cuda":
        flags += ["--deterministic"]
    for script in ("main", "main_fp16_optimizer"):
        assert jobs.run(monkeypatch, corpus, tmp_path / script, script, *flags) == 0
    manual, wrapped = (tmp_path / "main", tmp_path / "main_fp16_optimizer")
    assert len(jobs.rows(manual)) > 2 * 160
    assert jobs.rows(manual) == jobs.rows(wrapped)
    for name, fields in (("epochs.jsonl", ["valid_loss", "lr"]), ("result.json", ["test_loss", "steps", "skipped"])):
        assert [[row[f] for f in fields] for row in read(manual / name)] == [
            [row[f] for f in fields] for row in read(wrapped / name)
        ]
    weights = [saved_weights(Path(f"{path}.pt")) for path in (manual, wrapped)]
    assert jobs.bits(list(weights[0].values())) == jobs.bits(list(weights[1].values()))


def read(path: Path) -> list[dict[str, Any]]:
    text = path.read_text()
    return [json.loads(text)] if path.suffix == ".json" else jobs.rows(path.parent, path.name)


LEARNS = {mode: (mode, []) for mode in jobs.MODES} | {
    f"Transformer {mode}": (mode, [*TRANSFORMER, "--lr", "0.5"]) for mode in ("manual", "amp-fp16", "amp-bf16")
}


@pytest.mark.parametrize("case", jobs.mostly_slow(LEARNS, *DEFAULT_MODES))
def test_every_mode_repeats_itself_and_learns(monkeypatch, tmp_path, corpus, case) -> None:
    mode, flags = LEARNS[case]
    for name in ("first", "second"):
        assert jobs.run(monkeypatch, corpus, tmp_path / name, *jobs.MODES[mode], "--max-steps", "120", *flags) == 0
    first, second = jobs.rows(tmp_path / "first"), jobs.rows(tmp_path / "second")
    assert first == second
    losses = [row["loss"] for row in first if row["applied"]]
    assert sum(losses[-20:]) < 0.95 * sum(losses[:20])
