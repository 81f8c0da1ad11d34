"""The run directory: every bit of every number, in JSON that any program reads."""

import math
import re
import struct
import tempfile
import time
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lm.training.loop
from jobs import count_tensors
from programs import BATCHES, HALF, SCRIPTS, TINY, read_rows, read_run, strict_json
from roundoff.device import driver_version
from roundoff.errors import UsageError
from roundoff.precision import StepResult
from roundoff.runs import directory, reading
from roundoff.runs.config_file import describe_device
from roundoff.runs.directory import START, RunDirectory
from roundoff.runs.files import lock, unlock
from roundoff.runs.json_text import to_json
from roundoff.runs.reading import perplexity

every_half = pytest.mark.parametrize(("script", "flags"), [(s, HALF[s]) for s in SCRIPTS], ids=SCRIPTS)


def step_result(norm: float | torch.Tensor = 1.0, scale: float = 1.0, applied: bool = True) -> StepResult:
    return StepResult(torch.tensor(applied), torch.as_tensor(norm), torch.tensor(scale))


def same_bits(a: float, b: float, form: str = "<f") -> bool:
    return struct.pack(form, a) == struct.pack(form, b) or (math.isnan(a) and math.isnan(b))


def new(path: Path, **options: Any) -> RunDirectory:
    """A run that flushes only when it is told to."""
    return RunDirectory(path, **{"mode": "fp32", "seed": 1, "interval": None} | options)


@given(st.floats())
def test_json_gives_every_float_back(value):
    assert same_bits(float(strict_json(to_json({"x": [value]}))["x"][0]), value, "<d")


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.inf, '"inf"'),
        (-math.inf, '"-inf"'),
        (math.nan, '"nan"'),
        (-0.0, "-0.0"),
        ({"a": [{"b": (math.inf, 1)}]}, '{"a": [{"b": ["inf", 1]}]}'),
        ({"path": Path("a/b"), "none": None, "yes": True}, '{"path": "a/b", "none": null, "yes": true}'),
        ({3: (1.5,), "int": 2**70}, f'{{"3": [1.5], "int": {2**70}}}'),
        ('schön "\n', '"schön \\"\\n"'),
        (MappingProxyType({"a": 1}), '{"a": 1}'),
        ([torch.tensor(1.5), torch.tensor(math.inf), torch.tensor(True)], '[1.5, "inf", true]'),
        ([np.float32(0.5), np.int64(3), np.bool_(True)], "[0.5, 3, true]"),
        ({"dtype": torch.bfloat16}, '{"dtype": "bfloat16"}'),
    ],
)
def test_json_of_any_value(value, written):
    assert to_json(value) == written
    strict_json(written)


def test_json_of_no_value():
    with pytest.raises(TypeError):
        to_json({"tensor": torch.zeros(2)})


@given(st.floats(width=32), st.floats(width=32), st.sampled_from([2.0**n for n in range(-20, 30)]), st.booleans())
def test_a_step_is_recorded_to_the_bit(loss, norm, scale, applied):
    """From a StepResult, and by name."""
    with tempfile.TemporaryDirectory() as folder:
        records = new(Path(folder))
        records.step(torch.tensor(loss), step_result(norm, scale, applied), epoch=3, lr=20.0 / 4**3)
        records.step(loss, grad_norm=norm, loss_scale=scale, applied=applied, epoch=3, lr=20.0 / 4**3)
        records.flush()
        rows = read_rows(Path(folder) / "steps.jsonl")
        records.close()
    for number, row in enumerate(rows, 1):
        assert list(row) == ["step", "epoch", "loss", "grad_norm", "loss_scale", "applied", "lr"]
        assert (row["step"], row["epoch"], row["applied"], row["lr"]) == (number, 3, applied, 0.3125)
        for name, value in {"loss": loss, "grad_norm": norm, "loss_scale": scale}.items():
            assert same_bits(float(row[name]), value)


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
        assert same_bits(row["loss"], loss.item())
        assert row["loss"] == loss.double().item()
    assert any(not same_bits(row["loss"], torch.tensor(row["loss"]).half().item()) for row in run.steps)


def test_rows_are_in_the_file_after_flush_and_counted(tmp_path):
    """Any number of them waits for it, with the values that they had then."""
    records = new(tmp_path / "run")
    norm = torch.zeros(())
    written: list[dict[str, Any]] = []
    for count in (200, 1, 64, 65, 0):
        for k in range(count):
            norm.fill_(k)
            records.step(torch.tensor(k + 0.5), step_result(norm, 2.0, k % 2 == 0), lr=1.0)
        assert read_rows(tmp_path / "run" / "steps.jsonl") == written
        assert records.skipped == sum(not row["applied"] for row in written)
        rows = records.flush()
        assert [(row["loss"], row["grad_norm"], row["applied"]) for row in rows] == [
            (k + 0.5, k, k % 2 == 0) for k in range(count)
        ]
        written += rows
        assert read_rows(tmp_path / "run" / "steps.jsonl") == written
        assert (records.steps, records.skipped) == (len(written), sum(not row["applied"] for row in written))
    assert [row["step"] for row in written] == list(range(1, 331))


def test_further_losses_are_means_over_processes_too(tmp_path):
    records = new(tmp_path / "run", average=lambda values: values + 0.5)
    records.step(1.0, grad_norm=2.0, losses={"kl": 3.0})
    (row,) = records.flush()
    assert (row["loss"], row["grad_norm"], row["losses"]) == (1.5, 2.0, {"kl": 3.5})


def test_steps_that_wait_are_one_tensor(tmp_path):
    records = new(tmp_path / "run")
    before = count_tensors()
    for _ in range(60):
        records.step(torch.tensor(2.0), step_result())
    assert count_tensors() == before


def test_epochs_and_result(tmp_path):
    config: dict[str, Any] = {"job": {}, "precision": {"mode": "fp32"}, "seed": 1, "environment": {}}
    config |= {"clip": math.inf, "save": Path("model.safetensors")}
    records = new(tmp_path / "run", config=config, derived={"ppl": perplexity})
    for epoch, loss in enumerate((5.0, 1000.0, math.nan), 1):
        records.epoch(loss, epoch=epoch, lr=20.0, seconds=1.5)
    records.write_result("finished", 1000.0, tokens_per_second=None, peak_memory_bytes=7)
    run = read_run(tmp_path / "run")
    assert [list(row.values()) for row in run.epochs] == [
        [1, 5.0, math.exp(5.0), 20.0, 1.5],
        [2, 1000.0, "inf", 20.0, 1.5],
        [3, "nan", "nan", 20.0, 1.5],
    ]
    assert list(run.epochs[0]) == ["epoch", "valid_loss", "valid_ppl", "lr", "seconds"]
    assert run.config == config | {"clip": "inf", "save": "model.safetensors"}
    assert run.result == {
        "status": "finished", "test_loss": 1000.0, "test_ppl": "inf", "steps": 0, "skipped": 0,
        "tokens_per_second": None, "peak_memory_bytes": 7,
    }  # fmt: skip
    records.write_result("interrupted", None)  # a run ends once
    assert read_run(tmp_path / "run").result == run.result
    records.close()
    again = new(tmp_path / "run", resume=True, config=config, derived={"ppl": perplexity})
    again.write_result("interrupted", None)
    assert read_run(tmp_path / "run").result == {
        "status": "interrupted", "test_loss": None, "test_ppl": None, "steps": 0, "skipped": 0,
    }  # fmt: skip
    files = ["config.json", "epochs.jsonl", "result.json", "steps.jsonl"]
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == files


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(33278)) == pytest.approx(33278)
    assert perplexity(709.0) == math.exp(709.0)
    assert perplexity(710.0) == perplexity(math.inf) == math.inf
    assert math.isnan(perplexity(math.nan))


def test_a_loop_of_any_model(tmp_path):
    """The reader takes what a loop wrote that knows no language model."""
    model = torch.nn.Linear(2, 1)
    job = {"model": "linear", "lr": 0.1}
    with RunDirectory(tmp_path / "run", job=job, mode="bf16", seed=3, interval=4) as run:
        for step in range(6):
            loss = model(torch.ones(1, 2)).square().mean()
            run.step(loss, grad_norm=0.5, loss_scale=2.0, applied=step != 1)
            assert len(read_rows(tmp_path / "run" / "steps.jsonl")) == (step + 1) // 4 * 4
        run.finish(test_loss=0.25)
    read = reading.read_run(tmp_path / "run")
    assert (read.label, read.seed, read.status, read.job, read.problems) == ("bf16", 3, "finished", job, [])
    assert (read.steps["step"], read.steps["applied"]) == ([1, 2, 3, 4, 5, 6], [step != 1 for step in range(6)])
    assert read.result is not None
    assert (read.result["test_loss"], read.result["skipped"]) == (0.25, 1)
    assert reading.machine(read.config)["torch"] == torch.__version__
    assert "test_ppl" not in strict_json((tmp_path / "run/result.json").read_text())


NVRM = "NVRM version: NVIDIA UNIX "


@pytest.mark.parametrize(
    ("text", "version"),
    [
        (f"{NVRM}x86_64 Kernel Module  535.129.03  Thu Oct 19 18:56:32 UTC 2023\nGCC version: 12.3.0\n", "535.129.03"),
        (f"{NVRM}Open Kernel Module for x86_64  550.54.14  Release Build  (dvs-builder@U16-A24)\n", "550.54.14"),
        (f"{NVRM}x86_64 Kernel Module  460.39  Fri Jan 1 2021", "460.39"),
        ("no version\nGCC version: 12.3.0\n", None),
        ("", None),
        (b"\xff\x00 570.1", "570.1"),
        (None, None),
    ],
)  # fmt: skip
def test_the_version_of_the_driver(tmp_path, text, version):
    """As its first line names it."""
    file = tmp_path / "version"
    if text is not None:
        file.write_bytes(text if isinstance(text, bytes) else text.encode())
    assert driver_version(file) == version


@pytest.mark.parametrize(("number", "version"), [(91002, "91002"), (None, None)])
def test_what_a_run_says_of_a_gpu(monkeypatch, number, version):
    monkeypatch.setattr("roundoff.runs.config_file.device_name", lambda device: f"a {device}")
    monkeypatch.setattr("roundoff.runs.config_file.driver_version", lambda: "550.54.14")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    monkeypatch.setattr("roundoff.runs.config_file.tf32_allowed", lambda: True)
    half_sums = {"reduced_precision_reductions": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction}
    on_gpu = {"device": "a cuda:1", "cudnn": version, "driver": "550.54.14", "tf32": True}
    assert describe_device("cuda:1") == on_gpu | half_sums
    on_cpu = {"device": "a cpu", "cudnn": None, "driver": None, "tf32": False}
    assert describe_device("cpu") == on_cpu | {"reduced_precision_reductions": False}


def test_what_a_loop_says_of_its_precision_and_device(tmp_path, monkeypatch):
    """The device is that of what the first step brings, or the one that is named."""
    said = {"mode": "fp16", "dtype": torch.float16, "loss_scale": torch.tensor(128.0), "equals": ("manual",)}
    monkeypatch.setattr("roundoff.runs.config_file.device_name", lambda device: f"a {device}")
    with RunDirectory(tmp_path / "run", **said) as run:
        run.step(2.0, grad_norm=torch.tensor(1.0), loss_scale=128.0, lr=torch.tensor(0.5))
        run.epoch(torch.tensor(1.5), lr=torch.tensor(0.5))
        run.step(torch.tensor([3.0], requires_grad=True), loss_scale=128.0)
        run.finish(torch.tensor(0.25), top1=torch.tensor(0.5))
    read = reading.read_run(tmp_path / "run")
    assert read.config["precision"] == {"mode": "fp16", "dtype": "float16", "loss_scale": 128.0, "equals": ["manual"]}
    environment = read.config["environment"]
    assert (environment["device"], environment["processes"], environment["tf32"]) == ("a cpu", 1, False)
    assert (read.steps["loss"], read.steps["lr"][0], read.epochs[0]["valid_loss"]) == ([2.0, 3.0], 0.5, 1.5)
    assert strict_json((tmp_path / "run/result.json").read_text())["top1"] == 0.5
    with RunDirectory(tmp_path / "silent", device="cuda:1") as run:
        run.step(1.0, loss_scale=8.0)
    read = reading.read_run(tmp_path / "silent")
    assert (read.config["precision"], read.loss_scale, read.device) == ({"mode": ""}, 8.0, "a cuda:1")
    RunDirectory(tmp_path / "late").close()
    with RunDirectory(tmp_path / "late", resume=True) as run:
        run.go_back(START)
        run.step(torch.tensor(1.0))
    assert reading.read_run(tmp_path / "late").device == "a cpu"


def test_steps_wait_on_the_device_of_any_tensor_that_they_bring(tmp_path, device):
    """Not on torch's default device, which "meta" is here: it has no numbers."""
    records = new(tmp_path / "run")
    with torch.device("meta"):
        records.step(2.0, grad_norm=torch.ones((), device=device), applied=True)
    assert [row["grad_norm"] for row in records.flush()] == [1.0]


@pytest.mark.parametrize("error", [None, ZeroDivisionError, KeyboardInterrupt])
def test_a_block_that_ends_without_finish_is_an_interrupted_run(tmp_path, error):
    """Its steps are there, and others may use the directory."""
    try:
        with RunDirectory(tmp_path / "run", mode="fp32") as run:
            run.step(2.0)
            if error:
                raise error
    except (ZeroDivisionError, KeyboardInterrupt):
        pass
    read = reading.read_run(tmp_path / "run")
    assert (read.status, read.steps["loss"]) == ("interrupted", [2.0])
    RunDirectory(tmp_path / "run", resume=True).close()


def test_what_waits_is_recorded_before_a_checkpoint_and_forgotten_after_it(tmp_path):
    """So a resumed loop goes on as if nobody had stopped it, and counts on its epochs."""
    heard: list[dict[str, Any]] = []
    run = RunDirectory(tmp_path / "run", mode="fp32", seed=1, listeners=[Rows(heard)])
    run.start()
    for loss in (3.0, 2.0):
        run.step(loss)
        run.epoch(loss)
    run.step(1.5)
    state = run.state()
    assert state | {"steps.jsonl": 0, "epochs.jsonl": 0} == START | {"steps": 3}
    assert len(read_rows(tmp_path / "run" / "steps.jsonl")) == 3
    run.step(9.0, tokens=5)
    run.go_back(state)
    assert (run.flush(), run.state()) == ([], state)
    run.close()
    with RunDirectory(tmp_path / "run", resume=True, listeners=[Rows(heard)]) as again:
        again.go_back(state)
        again.step(1.0)
        again.epoch(1.0)
        again.finish()
    record = read_run(tmp_path / "run")
    assert [(row["step"], row["epoch"], row["loss"]) for row in record.steps] == [
        (1, 1, 3.0), (2, 2, 2.0), (3, 3, 1.5), (4, 3, 1.0),
    ]  # fmt: skip
    assert [row["epoch"] for row in record.epochs] == [1, 2, 3]
    assert [(row["step"], row["loss"]) for row in heard] == [(1, 3.0), (2, 2.0), (4, 1.0)]


class Rows:
    """A listener that keeps the intervals."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self.interval = rows.append

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


def test_a_write_that_fails_loses_no_step_and_leaves_no_half_row(tmp_path, monkeypatch):
    records, whole = new(tmp_path / "run"), directory.to_json
    records.step(1.0)
    records.flush()
    records.step(2.0)
    records.step(3.0)

    def full(row: dict[str, Any]) -> str:
        if row["step"] == 3:
            raise OSError(28, "No space left on device")
        return whole(row)

    monkeypatch.setattr(directory, "to_json", full)
    with pytest.raises(OSError, match="No space"):
        records.flush()
    assert [row["step"] for row in read_rows(tmp_path / "run" / "steps.jsonl")] == [1]
    monkeypatch.undo()
    assert [row["step"] for row in records.flush()] == [2, 3]
    assert [row["loss"] for row in read_rows(tmp_path / "run" / "steps.jsonl")] == [1.0, 2.0, 3.0]


@pytest.mark.parametrize(("processes", "kept"), [(1, 1), (2, 0)])
def test_a_failed_run_of_several_processes_waits_for_none(tmp_path, monkeypatch, processes, kept):
    """Its last steps need the others, which may have gone."""
    monkeypatch.setattr("roundoff.processes.world_size", lambda: processes)
    met = []

    def average(losses: torch.Tensor) -> torch.Tensor:
        met.append(len(losses))
        return losses

    def fail() -> None:
        with RunDirectory(tmp_path / "run", average=average) as run:
            run.step(1.0)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert (met, read_run(tmp_path / "run").result["steps"]) == ([1] * kept, kept)


def test_epochs_of_a_loop_that_counts_none(tmp_path):
    with RunDirectory(tmp_path / "run", mode="fp32") as run:
        for loss in (3.0, 2.0):
            run.step(loss)
            run.epoch(loss)
        run.finish()
    record = read_run(tmp_path / "run")
    assert [(row["epoch"], row["loss"]) for row in record.steps] == [(1, 3.0), (2, 2.0)]
    assert [(row["epoch"], row["valid_loss"]) for row in record.epochs] == [(1, 3.0), (2, 2.0)]
    assert [row["valid_loss"] for row in reading.read_run(tmp_path / "run").epochs] == [3.0, 2.0]
    assert all(row["seconds"] >= 0 for row in record.epochs)


def test_going_back_forgets_what_came_after_and_no_more(tmp_path):
    """A torn line goes too, and the result; files that are shorter than the state are refused and stay."""
    records = new(tmp_path / "run")
    states = [START]
    for step in range(3):
        records.step(1.0 * step, applied=step > 0)
        records.flush()
        records.epoch(2.0)
        states.append(records.state())
        assert states[-1]["skipped"] == 1
    records.write_result("interrupted", None)
    records.close()
    texts = {name: (tmp_path / "run" / name).read_text() for name in ("steps.jsonl", "epochs.jsonl")}
    for kept in (3, 2, 1, 0):
        for name in texts:
            with (tmp_path / "run" / name).open("a") as file:
                file.write('{"step": 9, "lo')
        again = new(tmp_path / "run", resume=True)
        again.go_back(states[kept])
        assert (again.steps, again.skipped) == (kept, min(kept, 1))
        for name, text in texts.items():
            assert (tmp_path / "run" / name).read_text() == "".join(text.splitlines(keepends=True)[:kept])
        assert not (tmp_path / "run" / "result.json").exists()
        again.close()
    again = new(tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"steps\.jsonl has 0 bytes, not"):
        again.go_back(states[1])
    (tmp_path / "run" / "steps.jsonl").write_text(texts["steps.jsonl"])
    (tmp_path / "run" / "epochs.jsonl").write_text(texts["epochs.jsonl"])
    with pytest.raises(ValueError, match=r"steps\.jsonl has no row that ends at byte 9"):
        again.go_back(states[1] | {"steps.jsonl": 9})


ANOTHER = {
    "job": ({"job": {"lr": math.inf, "n": 2}}, 'with job {"lr": "inf", "n": 1}, not {"lr": "inf", "n": 2}; give'),
    "mode": ({"mode": "fp16"}, 'with mode "fp32", not "fp16"; give the same, or start a new run'),
    "seed": ({"seed": 0}, "with seed 3, not 0; give the same"),
}


@pytest.mark.parametrize("other", ANOTHER)
def test_another_run_does_not_go_on_in_a_directory(tmp_path, other):
    started = {"job": {"lr": math.inf, "n": 1}, "mode": "fp32", "seed": 3}
    RunDirectory(tmp_path / "run", **started, device="cpu").close()
    given, said = ANOTHER[other]
    with pytest.raises(UsageError, match=re.escape(f"path={tmp_path / 'run'}: the run was started {said}")):
        RunDirectory(tmp_path / "run", resume=True, **started | given)
    for same in (started, {}):
        again = RunDirectory(tmp_path / "run", resume=True, **same)
        assert again.config == strict_json((tmp_path / "run/config.json").read_text())
        again.close()


def test_a_run_goes_on_only_where_there_is_one(tmp_path):
    with pytest.raises(UsageError, match="resume=True without a path names no run"):
        RunDirectory(resume=True)
    (tmp_path / "steps.jsonl").touch()
    for config in (None, {}):
        with pytest.raises(UsageError, match=r"holds no run \(there is no config\.json\); give a run directory"):
            RunDirectory(tmp_path, resume=True, config=config)
    with pytest.raises(UsageError, match="cannot open it"):
        RunDirectory(tmp_path / "none", resume=True)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UsageError, match=r"config\.json is of no run"):
        RunDirectory(tmp_path, resume=True)
    unlock(lock(tmp_path))


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
        ("main", [], "fp32"),
        ("main", ["--fp16"], "manual"),
        ("main_fp16_optimizer", ["--fp16"], "fp16-optimizer"),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"], "fp16-optimizer-dynamic"),
        ("main_amp", [], "amp-fp16"),
        ("main_amp", ["--dtype", "bfloat16"], "amp-bf16"),
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
    with pytest.raises(UsageError, match=r"give path$"):
        RunDirectory(mode="x")
    RunDirectory().close()
    assert (tmp_path / "runs" / "run-20300102-030405" / "config.json").exists()


@pytest.mark.parametrize("new_one", [True, False])
def test_a_directory_that_cannot_be_made_whole_is_as_it_was(tmp_path, monkeypatch, new_one):
    if not new_one:
        (tmp_path / "run").mkdir()

    def full(path: Path) -> None:
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(Path, "touch", full)
    with pytest.raises(UsageError, match="cannot write there"):
        RunDirectory(tmp_path / "run")
    assert list(tmp_path.rglob("*")) == ([] if new_one else [tmp_path / "run"])


def test_a_command_that_is_not_utf8_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["train.py", "a\udcff"])
    RunDirectory(tmp_path / "run").close()
    config = strict_json((tmp_path / "run/config.json").read_text("utf-8"))
    assert config["environment"]["command"] == ["train.py", "a\udcff"]


FILES = [*directory.FILES, "checkpoint.safetensors"]


@pytest.mark.parametrize("rest", [None, *FILES])
def test_a_directory_with_any_file_of_a_run_is_refused(tmp_path, rest):
    """Rows of two runs in one file could not be told apart. An empty directory is used."""
    if rest is None:
        new(tmp_path)
        assert (tmp_path / "steps.jsonl").exists()
        return
    (tmp_path / rest).write_text("{}\n")
    with pytest.raises(UsageError, match="holds a run already"):
        new(tmp_path)
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
