"""The run directory: every bit of every number, in JSON that any program reads."""

import math
import struct
import tempfile
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lm.training.loop
from jobs import count_tensors
from programs import BATCHES, HALF, SCRIPTS, TINY, read_rows, read_run, strict_json
from roundoff.errors import UsageError
from roundoff.precision import StepResult
from roundoff.runs.directory import RunDirectory, perplexity
from roundoff.runs.jsonfile import to_json

every_half = pytest.mark.parametrize(("script", "flags"), [(s, HALF[s]) for s in SCRIPTS], ids=SCRIPTS)


def step_result(norm: float | torch.Tensor = 1.0, scale: float = 1.0, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor(applied), torch.as_tensor(norm), torch.tensor(scale))


def bits(value: float) -> bytes:
    return struct.pack("<f", value)


@given(st.floats())
def test_json_gives_every_float_back(value):
    back = float(strict_json(to_json({"x": [value]}))["x"][0])
    assert struct.pack("<d", back) == struct.pack("<d", value) or (math.isnan(back) and math.isnan(value))


@pytest.mark.parametrize(
    ("value", "written"), [(math.inf, '"inf"'), (-math.inf, '"-inf"'), (math.nan, '"nan"'), (-0.0, "-0.0")]
)
def test_json_has_no_infinity(value, written):
    assert to_json(value) == written
    assert to_json({"a": [{"b": (value, 1)}]}) == f'{{"a": [{{"b": [{written}, 1]}}]}}'


def test_json_of_the_rest():
    value = {"path": Path("a/b"), "none": None, "yes": True, "int": 2**70, "text": 'schön "\n', 3: (1.5,)}
    assert strict_json(to_json(value)) == {
        "path": "a/b", "none": None, "yes": True, "int": 2**70, "text": 'schön "\n', "3": [1.5],
    }  # fmt: skip
    with pytest.raises(TypeError):
        to_json({"tensor": torch.zeros(())})


@given(st.floats(width=32), st.floats(width=32), st.sampled_from([2.0**n for n in range(-20, 30)]), st.booleans())
def test_a_step_is_recorded_to_the_bit(loss, norm, scale, applied):
    with tempfile.TemporaryDirectory() as folder:
        records = RunDirectory.create(Path(folder), "", {})
        records.step(3, 20.0 / 4**3, torch.tensor(loss), step_result(norm, scale, applied))
        records.flush()
        (row,) = read_rows(Path(folder) / "steps.jsonl")
    assert (row["step"], row["epoch"], row["applied"], row["lr"]) == (1, 3, applied, 0.3125)
    for name, value in {"loss": loss, "grad_norm": norm, "loss_scale": scale}.items():
        back = float(row[name])
        assert bits(back) == bits(value) or (math.isnan(back) and math.isnan(value))


@every_half
def test_the_loss_of_a_run_is_the_exact_fp32_value(programs, script, flags, monkeypatch):
    losses = []
    next_word_loss = lm.training.loop.next_word_loss

    def keep(model, *rest):
        loss, hidden = next_word_loss(model, *rest)
        if model.training:
            losses.append(loss.detach().clone())
        return loss, hidden

    monkeypatch.setattr(lm.training.loop, "next_word_loss", keep)
    run = programs.train(script, *flags, "--log-interval", "7")
    assert len(losses) == len(run.steps) == 2 * BATCHES
    for row, loss in zip(run.steps, losses, strict=True):
        assert loss.dtype == torch.float32
        assert bits(row["loss"]) == bits(loss.item())
        assert row["loss"] == loss.double().item()
    assert any(bits(row["loss"]) != bits(torch.tensor(row["loss"]).half().item()) for row in run.steps)


def test_rows_are_in_the_file_after_flush_and_counted(tmp_path):
    records = RunDirectory.create(tmp_path / "run", "", {})
    for applied in (True, False, False):
        records.step(1, 1.0, torch.tensor(2.0), step_result(applied=applied))
    assert (tmp_path / "run" / "steps.jsonl").read_text() == ""
    assert (records.steps, records.skipped) == (3, 0)
    rows = records.flush()
    assert rows == read_rows(tmp_path / "run" / "steps.jsonl")
    assert [row["applied"] for row in rows] == [True, False, False]
    assert (records.steps, records.skipped) == (3, 2)
    assert records.flush() == []
    records.step(2, 1.0, torch.tensor(2.0), step_result())
    records.flush()
    assert [row["step"] for row in read_rows(tmp_path / "run" / "steps.jsonl")] == [1, 2, 3, 4]


def test_any_number_of_steps_waits_for_the_flush(tmp_path):
    records = RunDirectory.create(tmp_path / "run", "x", {})
    for count in (200, 1, 64, 65):
        norm = torch.zeros(())
        for k in range(count):
            norm.fill_(k)  # what was recorded is the value that it had then
            records.step(1, 1.0, torch.tensor(k + 0.5), step_result(norm, scale=2.0, applied=k % 2 == 0))
        rows = records.flush()
        assert [row["loss"] for row in rows] == [k + 0.5 for k in range(count)]
        assert [row["grad_norm"] for row in rows] == list(range(count))
        assert [row["applied"] for row in rows] == [k % 2 == 0 for k in range(count)]
    assert records.steps == 330


def test_steps_that_wait_are_one_tensor(tmp_path):
    records = RunDirectory.create(tmp_path / "run", "x", {})
    before = count_tensors()
    for _ in range(60):
        records.step(1, 1.0, torch.tensor(2.0), step_result())
    assert count_tensors() == before


def test_epochs_and_result(tmp_path):
    records = RunDirectory.create(tmp_path / "run", "", {"clip": math.inf, "save": Path("model.safetensors")})
    records.epoch(1, 5.0, 20.0, 1.5)
    assert read_rows(tmp_path / "run" / "epochs.jsonl") == [
        {"epoch": 1, "valid_loss": 5.0, "valid_ppl": math.exp(5.0), "lr": 20.0, "seconds": 1.5}
    ]
    records.epoch(2, 1000.0, 20.0, 1.5)
    records.epoch(3, math.nan, 20.0, 1.5)
    records.write_result("finished", 1000.0, tokens_per_second=None, peak_memory_bytes=7)
    records.flush()
    assert [row["valid_ppl"] for row in read_rows(tmp_path / "run" / "epochs.jsonl")[1:]] == ["inf", "nan"]
    run = read_run(tmp_path / "run")
    assert run.config == {"clip": "inf", "save": "model.safetensors"}
    assert run.result == {
        "status": "finished", "test_loss": 1000.0, "test_ppl": "inf", "steps": 0, "skipped": 0,
        "tokens_per_second": None, "peak_memory_bytes": 7,
    }  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "config.json", "epochs.jsonl", "result.json", "steps.jsonl",
    ]  # fmt: skip


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(33278)) == pytest.approx(33278)
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


@pytest.fixture
def noon(monkeypatch) -> None:
    """A clock that stands still."""
    strftime = time.strftime
    at = time.struct_time((2030, 1, 2, 3, 4, 5, 2, 2, 0))
    monkeypatch.setattr(time, "strftime", lambda form, _=None: strftime(form, at))


@pytest.mark.usefixtures("noon")
@pytest.mark.parametrize(
    ("script", "flags", "name"),
    [
        ("main", [], "main-fp32"),
        ("main", ["--fp16"], "main-fp16"),
        ("main_fp16_optimizer", ["--fp16"], "main_fp16_optimizer-fp16-static"),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"], "main_fp16_optimizer-fp16-dynamic"),
        ("main_amp", [], "main_amp-float16"),
        ("main_amp", ["--dtype", "bfloat16"], "main_amp-bfloat16"),
    ],
)
def test_default_name_and_its_collisions(programs, script, flags, name):
    """Two runs of one second do not mix."""
    for _ in range(2):
        assert programs.run(script, *TINY[:-2], *flags, "--dry-run").code == 0
    stamped = f"{name}-20300102-030405"
    assert sorted(path.name for path in (programs.folder / "runs").iterdir()) == [stamped, f"{stamped}-2"]
    for folder in (programs.folder / "runs").iterdir():
        assert len(read_run(folder).steps) == 1


@pytest.mark.usefixtures("noon")
def test_names_run_out_with_a_clear_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stamped = "x-20300102-030405"
    for name in (stamped, *(f"{stamped}-{n}" for n in range(2, 1000))):
        (tmp_path / "runs" / name).mkdir(parents=True)
    with pytest.raises(UsageError, match=r"--run-dir"):
        RunDirectory.create(None, "x", {})


def test_a_directory_that_is_there_but_empty_is_used(tmp_path):
    (tmp_path / "run").mkdir()
    RunDirectory.create(tmp_path / "run", "", {})
    assert (tmp_path / "run" / "steps.jsonl").exists()


@pytest.mark.parametrize("rest", ["steps.jsonl", "epochs.jsonl", "result.json", "config.json"])
def test_a_directory_with_any_file_of_a_run_is_refused(tmp_path, rest):
    """Rows of two runs in one file could not be told apart."""
    (tmp_path / rest).write_text("{}\n")
    with pytest.raises(UsageError, match="holds a run already"):
        RunDirectory.create(tmp_path, "", {})
    assert [path.name for path in tmp_path.iterdir()] == [rest]


@pytest.mark.parametrize("first_bad", [5, BATCHES + 5], ids=["first epoch", "second epoch"])
def test_tokens_a_second_of_a_run_that_ends_within_an_epoch(programs, monkeypatch, first_bad):
    """By a clock that advances with training alone, a second a step, a step has as many tokens as it has seconds."""
    seconds = 0
    train_step = lm.training.loop.Training.train_step

    def tick(*args):
        nonlocal seconds
        seconds += 1
        return train_step(*args)

    monkeypatch.setattr(lm.training.loop.Training, "train_step", tick)
    monkeypatch.setattr(time, "monotonic", lambda: float(seconds))
    programs.spoil_gradients(set(range(first_bad, 99)), "decoder.bias")
    assert programs.run("main", *TINY, "--max-skipped", "4", "--log-interval", "1").code == 1
    run = read_run(programs.folder / "run")
    assert run.result["steps"] == seconds == first_bad + 3
    words = 20 * run.result["steps"] - (8 if first_bad > BATCHES else 0)  # an epoch's last batch has 3 rows, not 5
    assert run.result["tokens_per_second"] == pytest.approx(words / seconds)
