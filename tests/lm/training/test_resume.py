"""A run that was killed anywhere and resumed is, to the byte, the run that was left alone."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch

import jobs
import lm.training.loop
from programs import BATCHES, TINY, strict_json
from runs import kill_at, outcome, resume, signal_at

KINDS = {"LSTM": [], "LSTM tied": ["--tied"], "GRU": ["--model", "GRU"], "GRU tied": ["--model", "GRU", "--tied"]}
KINDS["Transformer"] = ["--model", "Transformer", "--lr", "0.5"]
FLAGS = [*TINY, "--epochs", "3", "--lr", "30", "--log-interval", "5", "--dropout", "0.3"]


@pytest.fixture
def whole(programs):
    """The outcome of the run with these flags that nobody disturbs; it leaves the folder as it was."""

    def make(script: str, *flags: str):
        assert programs.run(script, *FLAGS, *flags).code == 0
        result = outcome(programs.folder)
        shutil.rmtree("run")
        (programs.folder / "model.safetensors").unlink()
        return result

    return make


@pytest.mark.parametrize("kind", jobs.mostly_slow(KINDS, "LSTM"))
@pytest.mark.parametrize("mode", jobs.MODES)
def test_a_run_killed_twice(programs, monkeypatch, whole, mode, kind):
    """In the middle of the first epoch and of the last; checkpoints every 7 steps, of which an epoch has 18."""
    script, *flags = *jobs.MODES[mode], *KINDS[kind], "--checkpoint-interval", "7", "--scale-window", "4"
    expected = whole(script, *flags)
    kill_at(monkeypatch, programs, "train_step", 11, script, *FLAGS, *flags)
    kill_at(monkeypatch, programs, "train_step", 2 * BATCHES, script, "--resume", "run")
    resume(programs, script)
    assert outcome(programs.folder) == expected


@pytest.mark.parametrize(
    ("name", "call"),
    [
        ("train_step", 1),
        ("train_step", BATCHES),
        ("evaluate", 1),
        ("keep_or_anneal", 1),
        ("write_checkpoint", 1),
        ("train_step", BATCHES + 1),
        ("evaluate", 2),
        ("save_model", 2),
        ("write_checkpoint", 3),
        ("finish", 1),
        ("write_result", 1),
    ],
)
@pytest.mark.slow
@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer-dynamic", "amp-fp16"])
def test_a_run_killed_anywhere(programs, monkeypatch, whole, mode, name, call):
    """With the checkpoints that are written by default."""
    script, *flags = jobs.MODES[mode]
    expected = whole(script, *flags)
    kill_at(monkeypatch, programs, name, call, script, *FLAGS, *flags)
    resume(programs, script)
    assert outcome(programs.folder) == expected


def test_more_epochs_are_the_longer_run(programs, whole):
    expected = whole("main", "--fp16")
    assert programs.run("main", *FLAGS, "--fp16", "--epochs", "2").code == 0
    resume(programs, "main", "--epochs", "3")
    assert outcome(programs.folder) == expected
    config = strict_json(Path("run/config.json").read_text())
    assert (config["epochs"], config["environment"]["command"][-2:]) == (3, ["--epochs", "3"])
    Path("run/result.json").unlink()
    resume(programs, "main")  # the flags given at the last time count
    assert outcome(programs.folder) == expected


def test_what_may_change_does_not_matter(programs, monkeypatch, whole):
    """Where it ends, what it shows, and where its files lie now; the corpus and the model were moved."""
    expected = whole("main_amp")
    kill_at(monkeypatch, programs, "train_step", BATCHES + 7, "main_amp", *FLAGS)
    Path("corpus").rename("elsewhere")
    Path("model.safetensors").unlink()
    resume(
        programs,
        "main_amp",
        "--data",
        "elsewhere",
        "--save",
        "new.pt",
        "--log-interval",
        "2",
        "--checkpoint-interval",
        "3",
    )
    assert outcome(programs.folder, model="new.pt") == expected
    assert not Path("model.safetensors").exists()


def test_the_run_itself_may_move(programs, monkeypatch, whole):
    expected = whole("main", "--tied")
    kill_at(monkeypatch, programs, "train_step", BATCHES + 7, "main", *FLAGS, "--tied")
    Path("run").rename("moved")
    done = programs.run("main", "--resume", "moved")
    assert (done.code, done.err) == (0, "")
    assert outcome(programs.folder, run="moved") == expected


def test_another_run_has_overwritten_the_best_model(programs, monkeypatch, whole):
    """--save is model.safetensors for every run. Only the first epoch is validated well here."""
    validations = 0
    evaluate = lm.training.loop.evaluate

    def rising(model, precision, source, *rest):
        nonlocal validations
        validations += 1
        return evaluate(model, precision, source, *rest) + validations

    monkeypatch.setattr(lm.training.loop, "evaluate", rising)
    expected = whole("main")
    validations = 0
    kill_at(monkeypatch, programs, "train_step", 2 * BATCHES, "main", *FLAGS)
    Path("model.safetensors").write_bytes(b"of another run")
    resume(programs, "main")
    assert outcome(programs.folder) == expected


def test_a_finished_run_is_tested_again_and_stays_as_it_is(programs):
    assert programs.run("main", *FLAGS).code == 0
    before = outcome(programs.folder)
    assert "| End of training | test loss" in resume(programs, "main").out
    assert outcome(programs.folder) == before


def test_a_run_that_goes_on_elsewhere_says_so(programs, monkeypatch):
    """And its config.json names the new machine; of a run that stays where it was nothing is said."""
    kill_at(monkeypatch, programs, "train_step", BATCHES + 7, "main", *FLAGS)
    path = Path("run/config.json")
    here = strict_json(path.read_text())
    assert "its bits may" not in resume(programs, "main").out
    threads = here["environment"]["threads"]
    elsewhere = here | {"environment": here["environment"] | {"threads": threads + 1, "torch": "1.0\n"}}
    path.write_text(json.dumps(elsewhere))
    out = resume(programs, "main").out
    line = f"| torch {torch.__version__}, not 1.0\\n, threads {threads}, not {threads + 1}: its bits may be others"
    assert out.splitlines()[1].startswith(line)
    assert strict_json(path.read_text())["environment"] | {"command": []} == here["environment"] | {"command": []}
    assert "its bits may" not in resume(programs, "main").out


def test_flags_given_again(programs, monkeypatch):
    kill_at(monkeypatch, programs, "train_step", BATCHES + 7, "main", *FLAGS)
    assert "going on with run at epoch 2, step 19\n" in resume(programs, "main", "--lr", "30", "--seed", "1111").out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--lr", "5"], "--lr 5.0: the run was started with 30.0"),
        (["--tied"], "--tied True: the run was started with False"),
        (["--fp16"], "--fp16 True: the run was started with False"),
        (["--batch-size", "8"], "--batch-size 8: the run was started with 4"),
        (["--static-loss-scale", "2"], "--static-loss-scale 2.0: the run was started with the default"),
        (["--run-dir", "other"], "--run-dir other: the run was started with run"),
        (["--epochs", "1"], "it has trained for 3 epochs already, and --epochs is 1"),
        (["--data", "python-docs"], "its corpus was another one"),
    ],
)
def test_flags_that_contradict_the_run(programs, flags, message):
    assert programs.run("main", *FLAGS).code == 0
    assert message in programs.refuse("main", "--resume", "run", *flags)


def test_nothing_to_resume(programs):
    assert "holds no run" in programs.refuse("main", "--resume", "nowhere")
    Path("empty").mkdir()
    assert "holds no run" in programs.refuse("main", "--resume", "empty")
    assert programs.run("main", *FLAGS).code == 0
    assert "a run of main, not of main_amp.py" in programs.refuse("main_amp", "--resume", "run")
    assert "--resume run" in programs.refuse("main", *FLAGS)


def test_a_diverged_run_is_not_resumed(programs):
    programs.spoil_gradients(set(range(5, 99)), "decoder.bias")
    assert programs.run("main", *FLAGS, "--max-skipped", "4").code == 1
    assert "has diverged, and would again" in programs.refuse("main", "--resume", "run")


stopped_at = pytest.mark.parametrize(
    ("name", "call"),
    [
        ("train_step", 7),
        pytest.param("train_step", BATCHES, marks=pytest.mark.slow),
        ("evaluate", 2),
        pytest.param("finish", 1, marks=pytest.mark.slow),
    ],
)


@stopped_at
@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer-dynamic", "amp-bf16"])
def test_ctrl_c_and_resume(programs, monkeypatch, whole, mode, name, call):
    """The interrupted run has tested a model and saved it; the resumed one does not know of that."""
    script, *flags = jobs.MODES[mode]
    expected = whole(script, *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGINT, name, call)
        assert programs.run(script, *FLAGS, *flags).code == 0
    resume(programs, script)
    assert outcome(programs.folder) == expected


@stopped_at
@pytest.mark.parametrize("mode", ["fp32", "fp16-optimizer-dynamic", "amp-fp16"])
def test_sigterm_and_resume(programs, monkeypatch, whole, mode, name, call):
    script, *flags = jobs.MODES[mode]
    expected = whole(script, *flags)
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGTERM, name, call)
        done = programs.run(script, *FLAGS, *flags)
    assert (done.code, done.err) == (143, "")
    assert "End of training" not in done.out
    assert strict_json(Path("run/result.json").read_text())["status"] == "interrupted"
    resume(programs, script)
    assert outcome(programs.folder) == expected


def test_sigterm_loses_no_step(programs, monkeypatch):
    """Neither in an epoch nor in its validation, which would take long."""
    for call, epoch, step in ((7, 1, 8), (1, 1, BATCHES + 1)):
        with monkeypatch.context() as patch:
            signal_at(patch, signal.SIGTERM, "train_step" if call == 7 else "evaluate", call)
            command = ["--resume", "run"] if Path("run").exists() else FLAGS
            assert programs.run("main", *command).code == 143
        with monkeypatch.context() as patch:
            signal_at(patch, signal.SIGTERM, "train_step" if call == 7 else "evaluate", 1)
            assert f"going on with run at epoch {epoch}, step {step}\n" in programs.run("main", "--resume", "run").out


def test_a_second_ctrl_c_and_resume(programs, monkeypatch, whole):
    expected = whole("main_amp")
    with monkeypatch.context() as patch:
        signal_at(patch, signal.SIGINT, "train_step", BATCHES + 7, times=2)
        assert programs.run("main_amp", *FLAGS).code == 130
    resume(programs, "main_amp")
    assert outcome(programs.folder) == expected


def test_the_streak_of_skipped_steps_goes_on(programs, monkeypatch):
    """Bad from step 5 on, a checkpoint at step 9: the run ends after 10 of them, whether it was killed or not."""
    flags = [*FLAGS, "--max-skipped", "10", "--checkpoint-interval", "3"]
    programs.spoil_gradients(set(range(5, 99)), "decoder.bias")
    kill_at(monkeypatch, programs, "train_step", 11, "main", *flags)
    monkeypatch.undo()
    monkeypatch.chdir(programs.folder)
    programs.spoil_gradients(set(range(1, 99)), "decoder.bias")
    done = programs.run("main", "--resume", "run")
    assert (done.code, done.err.count("up to step 14,")) == (1, 1)
    assert strict_json(Path("run/result.json").read_text())["skipped"] == 10
