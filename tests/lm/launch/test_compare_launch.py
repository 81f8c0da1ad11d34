"""Running the modes as processes: what is run, where, how many at a time, and what happens to them on an interrupt."""

import json
import math
import os
import re
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from lm.launch import jobs as launch
from lm.launch import progress
from lm.launch.jobs import Training, check_flags, comparison_folder, run_jobs, slot_environments
from lm.options.config import make_args
from lm.options.modes import MODES, Mode, mode_of
from lm.options.options import as_values
from roundoff.errors import UsageError
from roundoff.runs.json_text import to_json

PLAN = {"modes": ["fp32"], "seeds": [1], "options": {}, "jobs": 1}


@pytest.mark.parametrize("mode", MODES)
def test_a_mode_is_what_its_trainer_calls_it(mode) -> None:
    """Or a run made here would be compared under another name."""
    chosen = MODES[mode]
    assert mode_of(make_args(chosen.script, **chosen.options)) == chosen
    assert make_args(chosen.script, **chosen.options).dtype == chosen.dtype
    assert (launch.ROOT / f"{chosen.script}.py").is_file()


def test_modes_that_must_be_equal_name_each_other() -> None:
    for mode in MODES.values():
        assert all(MODES[other].equals == mode.equals for other in mode.equals)
        assert mode.name in mode.equals or not mode.equals


def test_the_command_of_a_run() -> None:
    job = Training("fp16-optimizer-dynamic", 7, Path("out/runs/x"), {"nhid": 8, "tied": False})
    assert job.command == [
        *(sys.executable, str(Path(launch.__file__).parents[2] / "main_fp16_optimizer.py")),
        *("--fp16", "--dynamic-loss-scale", "--nhid=8", "--no-tied", "--seed=7"),
        *("--run-dir=out/runs/x", "--save=out/runs/x/model.safetensors"),
    ]


@pytest.mark.parametrize(
    ("flags", "seed", "rest"),
    [
        ([], 1111, {}),
        (["--nhid", "8", "--seed", "5", "--tied"], 5, {"nhid": 8, "tied": True}),
        (["--seed=5", "--seed", "6"], 6, {}),
    ],
)
def test_the_seed_is_taken_out_of_the_options(corpus, flags, seed, rest) -> None:
    found = check_flags(["fp32", "amp-bf16"], ["--data", str(corpus), "--emsize", "8", *flags])
    assert found == (seed, {"data": str(corpus), "emsize": 8, **rest}, "cpu")


def test_options_of_a_dynamic_scale_go_to_the_modes_that_have_one(corpus) -> None:
    """Given to one trainer alone they are refused where they change nothing."""
    labels = ["fp32", "manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16"]
    _, options, _ = check_flags(labels, ["--data", str(corpus), "--init-scale", "4", "--scale-window", "9"])
    assert (options["init_scale"], options["scale_window"]) == (4.0, 9)
    commands = {label: Training(label, 1, Path("x"), options).command for label in labels}
    told = {label: [word for word in words if re.search("-scale|-window", word)] for label, words in commands.items()}
    assert told == {label: [] for label in labels} | {
        "fp16-optimizer-dynamic": ["--dynamic-loss-scale", "--init-scale=4.0", "--scale-window=9"],
        "amp-fp16": ["--init-scale=4.0", "--scale-window=9"],
    }
    with pytest.raises(UsageError, match="--init-scale after --: none of the modes fp32,amp-bf16 has a dynamic loss"):
        check_flags(["fp32", "amp-bf16"], ["--data", str(corpus), "--init-scale", "4"])


def test_runs_at_a_time_share_the_threads_of_the_cpu(monkeypatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 16)
    assert slot_environments(1, "cpu") == [{}]
    assert slot_environments(3, "cpu") == [{"OMP_NUM_THREADS": "5"}] * 3
    assert slot_environments(40, "cpu")[-1] == {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("visible", "names"), [(None, "0 1 0"), ("3,5", "3 5 3"), ("GPU-a,GPU-b", "GPU-a GPU-b GPU-a")]
)
def test_runs_at_a_time_go_round_the_gpus(monkeypatch, visible, names) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slot_environments(3, "cuda")] == names.split()
    assert slot_environments(3, "cuda:1") == slot_environments(3, "cuda:0") == [{}] * 3  # asked for by number
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert slot_environments(2, "cuda") == [{}] * 2


@pytest.fixture
def trainer(tmp_path, monkeypatch):
    """Lets a few lines of Python stand for all trainers, since torch takes seconds to import."""
    (tmp_path / "scripts").mkdir()
    monkeypatch.setattr(launch, "ROOT", tmp_path / "scripts")
    monkeypatch.setattr(launch, "MODES", {name: Mode(name, name, {}, "float32") for name in "abc"})

    def write(**sources: str) -> list[Training]:
        for name, source in sources.items():
            (tmp_path / f"scripts/{name}.py").write_text(f"import os, signal, sys, time\n{source}\n")
        return [Training(name, 1, tmp_path / "out/runs" / f"{name}-1", {}) for name in sources]

    return write


def test_what_trainers_get_and_say(trainer, tmp_path, capsys) -> None:
    """Two at a time: the third takes the place of the first that ends, and the failure of one is its own."""
    source = "print(os.environ['SLOT'], sys.stdin.read(), os.getcwd())"
    c_has_started = tmp_path / "out/runs/c-1.log"
    lasting = f"{source}\nfor _ in range(1000): time.sleep(0 if os.path.exists({str(c_has_started)!r}) else 0.01)"
    made = trainer(a=lasting, b=f"{source}\nsys.exit('error: bad luck')", c=source)
    with comparison_folder(tmp_path / "out", PLAN) as lock:
        failures = run_jobs(made, [{"SLOT": "0"}, {"SLOT": "1"}], lock)
    assert [job.log.read_text().split()[0] for job in made] == ["0", "1", "1"]
    assert made[0].log.read_text().split()[1] == os.getcwd()  # noqa: PTH109 - a string
    by_label = {failure.label: failure for failure in failures}
    assert set(by_label) == {"a", "b", "c"}  # none left a run directory
    assert (by_label["b"].exit_code, by_label["b"].message) == (1, "bad luck")
    assert by_label["b"].command == made[1].command
    assert by_label["c"].exit_code == 0
    assert "| b                      | seed 1 | failed      | " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("source", "exit_code", "message"),
    [
        ("pass", 0, "it said nothing"),
        ("print('first\\nsecond\\n\\n', file=sys.stderr); sys.exit(3)", 3, "second"),
        ("sys.stdout.buffer.write(b'\\xff' * 9000 + b'\\nlast')", 0, "last"),
        ("print('so far', flush=True); os.kill(os.getpid(), 9)", -9, "Killed (signal 9); its last line: so far"),
    ],
)
def test_the_message_of_a_failure(trainer, tmp_path, source, exit_code, message) -> None:
    with comparison_folder(tmp_path / "out", PLAN) as lock:
        (failure,) = run_jobs(trainer(a=source), [{}], lock)
    assert (failure.exit_code, failure.message) == (exit_code, message)


def test_a_trainer_holds_the_folder_too(trainer, tmp_path) -> None:
    """So that no second comparison starts among trainers whose compare.py was killed."""
    source = f"""
def is_lock(number):
    try:
        return os.path.samestat(os.fstat(number), os.stat({str(tmp_path / "out/runs")!r}))
    except OSError:
        return False
print(sum(map(is_lock, range(3, 256))))"""
    with comparison_folder(tmp_path / "out", PLAN) as lock:
        (failure,) = run_jobs(trainer(a=source), [{}], lock)
    assert failure.message == "1"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_trainers(trainer, tmp_path, monkeypatch, number) -> None:
    """One ends by itself, one does not; the third is never started. No process is left, nor a handler."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("this process was told to ignore the signal, as nohup does")
    monkeypatch.setattr(launch, "GRACE", 0.2)
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    deaf = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(600)"
    obedient = f"""
def obey(*_): print('obeyed', flush=True); os._exit(0)
signal.signal(signal.SIGTERM, obey)
while not os.path.exists({str(tmp_path / "out/runs/b-1.log")!r}): time.sleep(0.01)
while b'deaf' not in open({str(tmp_path / "out/runs/b-1.log")!r}, 'rb').read(): time.sleep(0.01)
os.kill(os.getppid(), {int(number)})
time.sleep(600)"""
    made = trainer(a=obedient, b=deaf, c="pass")
    with comparison_folder(tmp_path / "out", PLAN) as lock, pytest.raises(KeyboardInterrupt):
        run_jobs(made, [{}, {}], lock)
    assert made[0].log.read_text() == "obeyed\n"
    assert not made[2].log.exists()
    with comparison_folder(tmp_path / "out", PLAN):  # nobody has the lock
        pass
    assert {n: signal.getsignal(n) for n in before} == before


def test_one_user_of_a_folder_at_a_time(tmp_path) -> None:
    out = tmp_path / "out"
    with comparison_folder(out, PLAN), pytest.raises(UsageError, match="in use by another"):
        comparison_folder(out, PLAN).__enter__()
    with comparison_folder(out, PLAN) as lock:
        inherited = os.dup(lock)  # as a trainer has it
    with pytest.raises(UsageError, match="in use"):
        comparison_folder(out, PLAN).__enter__()
    os.close(inherited)
    with comparison_folder(out, PLAN):
        pass


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"modes": ["fp32"]}'])
def test_a_folder_of_something_else_is_refused(tmp_path, content) -> None:
    (tmp_path / "thesis.tex").write_text("all of it")
    if content is not None:
        (tmp_path / "compare.json").write_text(content)
    with pytest.raises(UsageError, match="holds something else"):
        comparison_folder(tmp_path, PLAN).__enter__()
    assert not (tmp_path / "runs").exists()


def record(job: Training, status: str, **changes: Any) -> None:
    """Leave what a trainer leaves that was given the options of `job`, but for `changes`."""
    job.run_dir.mkdir(parents=True, exist_ok=True)
    args = make_args(MODES[job.label].script, **{**job.all_options(), **changes})
    (job.run_dir / "config.json").write_text(to_json({"options": as_values(args)}))
    (job.run_dir / "result.json").write_text(json.dumps({"status": status}))


def test_which_runs_are_kept(tmp_path) -> None:
    """This very run, be it where it may; not one of another seed, mode or size, nor what cannot be read."""
    here = Training("manual", 5, tmp_path / "manual-5", {"nhid": 8, "clip": math.inf})
    assert here.result() is None
    record(here, "finished")
    assert here.result() == {"status": "finished"}
    record(here, "diverged", run_dir="/elsewhere/manual-5", save="/elsewhere/model.safetensors")
    assert here.result() == {"status": "diverged"}
    for other in (
        Training("fp32", 5, here.run_dir, here.options),
        Training("manual", 6, here.run_dir, here.options),
        Training("manual", 5, here.run_dir, {"nhid": 9, "clip": math.inf}),
    ):
        assert other.result() is None
        assert other.resumed() is None
    for content in ({}, {"options": None}, {"options": {}}, {"options": []}, []):
        (here.run_dir / "config.json").write_text(json.dumps(content))
        assert here.result() is None
    record(here, "finished")
    (here.run_dir / "result.json").write_text('{"status": ')
    assert here.result() is None
    shutil.rmtree(here.run_dir)
    assert here.result() is None


def test_a_run_under_way_goes_on_wherever_the_folder_is_now(tmp_path, monkeypatch) -> None:
    (tmp_path / "main.py").write_text("import sys; print(sys.argv[1:])")
    monkeypatch.setattr(launch, "ROOT", tmp_path)
    here = Training("fp32", 1, tmp_path / "out/runs/fp32-1", {})
    with comparison_folder(tmp_path / "out", PLAN) as lock:
        record(here, "interrupted", run_dir="elsewhere/fp32-1", save="elsewhere/model.safetensors")
        run_jobs([here], [{}], lock)
    words = [f"--resume={here.run_dir}", f"--save={here.run_dir / 'model.safetensors'}"]
    assert here.log.read_text() == f"{words}\n"
    assert (here.run_dir / "config.json").exists()


@pytest.mark.parametrize("flags", ["--epochs 2", "--epochs 3 --bptt 8", "--epochs 2 --max-steps 9", "--dry-run"])
def test_how_far_a_run_is(monkeypatch, corpus, tmp_path, flags) -> None:
    """The batches that the progress bar expects are those that the trainer makes."""
    run_dir = tmp_path / "run"
    assert progress.batches_expected(run_dir) is None
    assert progress.steps_done(run_dir) == 0
    assert jobs.run(monkeypatch, corpus, run_dir, "main", *flags.split()) == 0
    steps = len(jobs.rows(run_dir))
    assert steps > 0
    assert progress.batches_expected(run_dir) == progress.steps_done(run_dir) == steps
    with (run_dir / "steps.jsonl").open("a") as file:
        file.write('{"step": 1')  # being written
    assert progress.steps_done(run_dir) == steps
