"""A run that was killed anywhere and resumed is, to the byte, the run that was left alone."""

import shutil

import pytest

import jobs
from programs import BATCHES, TINY
from runs import kill_at, outcome, resume

KINDS = {"LSTM": [], "LSTM tied": ["--tied"], "GRU": ["--model", "GRU"], "GRU tied": ["--model", "GRU", "--tied"]}
FLAGS = [*TINY, "--epochs", "3", "--lr", "30", "--log-interval", "5", "--dropout", "0.3"]


@pytest.fixture
def whole(programs):
    """The outcome of the run with these flags that nobody disturbs; it leaves the folder as it was."""

    def make(script: str, *flags: str):
        assert programs.run(script, *FLAGS, *flags).code == 0
        result = outcome(programs.folder)
        shutil.rmtree("run")
        (programs.folder / "model.pt").unlink()
        return result

    return make


@pytest.mark.parametrize("kind", KINDS)
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
@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer-dynamic", "amp-fp16"])
def test_a_run_killed_anywhere(programs, monkeypatch, whole, mode, name, call):
    """With the checkpoints that are written by default."""
    script, *flags = jobs.MODES[mode]
    expected = whole(script, *flags)
    kill_at(monkeypatch, programs, name, call, script, *FLAGS, *flags)
    resume(programs, script)
    assert outcome(programs.folder) == expected
