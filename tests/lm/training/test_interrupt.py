"""Ctrl-C in every phase of a run, and the progress bar, which is for terminals only."""

import fcntl
import os
import re
import signal
import struct
import termios

import pytest
import torch

import lm.training.loop
from checkpoints import saved_weights
from lm.model.model_file import load_model
from programs import BATCHES, HALF, SCRIPTS, TINY, read_run, start, write_corpus
from runs import signal_at

every_half = pytest.mark.parametrize(("script", "flags"), [(s, HALF[s]) for s in SCRIPTS], ids=SCRIPTS)


@pytest.fixture
def keep_handler():
    """No run may leave its own handler behind."""
    before = signal.getsignal(signal.SIGINT)
    yield
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("keep_handler")
@every_half
def test_ctrl_c_in_the_first_epoch(programs, script, flags, monkeypatch):
    """The step is finished, the model so far is tested and saved."""
    signal_at(monkeypatch, signal.SIGINT, "train_step", 7)
    done = programs.run(script, *TINY, *flags, "--log-interval", "5")
    assert (done.code, done.err) == (0, "")
    run = read_run(programs.folder / "run", done.out)
    assert (run.result["status"], run.result["steps"], len(run.steps), run.epochs) == ("interrupted", 7, 7, [])
    assert f"| test loss {run.result['test_loss']:5.2f} | test ppl {run.result['test_ppl']:8.2f}\n" in done.out
    assert run.result["tokens_per_second"] > 0
    model, vocabulary = load_model(programs.folder / "model.safetensors")
    assert len(vocabulary) == 18
    assert all(weight.isfinite().all() for weight in model.parameters())


@pytest.mark.usefixtures("keep_handler")
@every_half
def test_ctrl_c_later_tests_the_best_model(programs, script, flags, monkeypatch):
    first_epoch = {}

    def keep(model, *_):
        first_epoch.setdefault("weights", {name: weight.clone() for name, weight in model.state_dict().items()})
        return 3.0

    monkeypatch.setattr(lm.training.loop, "evaluate", keep)
    signal_at(monkeypatch, signal.SIGINT, "train_step", BATCHES + 4)
    assert programs.run(script, *TINY, *flags).code == 0
    run = read_run(programs.folder / "run")
    assert (run.result["status"], len(run.steps), len(run.epochs)) == ("interrupted", BATCHES + 4, 1)
    saved = saved_weights(programs.folder / "model.safetensors")
    for name, weight in first_epoch["weights"].items():
        assert torch.equal(saved[name], weight)


@pytest.mark.usefixtures("keep_handler")
def test_ctrl_c_during_validation(programs, monkeypatch):
    signal_at(monkeypatch, signal.SIGINT, "evaluate", 1)
    done = programs.run("main", *TINY)
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"], len(run.steps)) == (0, "interrupted", BATCHES)
    assert "| End of training | test loss " in done.out


@pytest.mark.usefixtures("keep_handler")
def test_ctrl_c_during_the_test_does_not_cost_its_result(programs, monkeypatch):
    signal_at(monkeypatch, signal.SIGINT, "finish", 1)
    done = programs.run("main", *TINY)
    assert done.code == 0
    assert "| End of training | test loss " in done.out
    assert isinstance(read_run(programs.folder / "run").result["test_ppl"], float)


@pytest.mark.usefixtures("keep_handler")
@pytest.mark.parametrize("name", ["train_step", "finish"])
def test_a_second_ctrl_c_ends_at_once(programs, monkeypatch, name):
    """Also in the middle of a step."""
    signal_at(monkeypatch, signal.SIGINT, name, 1, times=2)
    done = programs.run("main", *TINY)
    assert (done.code, done.err) == (130, "")
    assert "End of training" not in done.out
    run = read_run(programs.folder / "run")
    assert (run.result["status"], run.result["test_loss"]) == ("interrupted", None)


def read_until(stream, text: bytes) -> bytes:
    """What the process printed up to the line with `text`."""
    lines = b""
    for line in stream:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{lines.decode()}")


@pytest.mark.slow
def test_ctrl_c_as_a_user_sends_it(programs):
    """In a pipe, which gets the documented lines and no byte of a progress bar."""
    flags = [*TINY, "--fp16", "--epochs", "1000000", "--log-interval", "5"]
    process = start(programs.folder, "main", *flags, stdout=-1, stderr=-1)
    try:
        out = read_until(process.stdout, b"| epoch   2 |    10/   17 batches |")
        process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0, b"")
    assert b"| End of training | test loss " in rest
    assert re.fullmatch(r"(\| [^\r\n]+\n|-+\n|=+\n|Exiting from training early\n)+", (out + rest).decode())
    run = read_run(programs.folder / "run")
    assert run.result["status"] == "interrupted"
    assert BATCHES + 10 <= run.result["steps"] == len(run.steps)
    assert len(load_model(programs.folder / "model.safetensors")[1]) == 18


@pytest.mark.slow
def test_a_second_ctrl_c_as_a_user_sends_it(programs):
    """During a test evaluation that would take long."""
    write_corpus(programs.folder / "big", test=200_000)
    flags = [*TINY, "--data", "big", "--epochs", "1000000", "--log-interval", "5", "--bptt", "1"]
    process = start(programs.folder, "main_amp", *flags, stdout=-1, stderr=-1)
    try:
        read_until(process.stdout, b"| epoch   1 |")
        process.send_signal(signal.SIGINT)
        read_until(process.stdout, b"Exiting from training early")
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (130, b"")
    assert b"End of training" not in out
    assert read_run(programs.folder / "run").result["status"] == "interrupted"


@pytest.mark.slow
def test_a_progress_bar_on_a_terminal(programs):
    """Standard error is a terminal and standard output a pipe, as with `| tee log`: only the terminal gets the bar."""
    terminal, stderr = os.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))  # in one without a size nothing fits
    os.set_blocking(terminal, False)
    flags = [*TINY, *HALF["main_fp16_optimizer"], "--epochs", "1", "--log-interval", "5"]
    process = start(programs.folder, "main_fp16_optimizer", *flags, stdout=-1, stderr=stderr)
    out, _ = process.communicate(timeout=60)
    shown = os.read(terminal, 1 << 16)  # before the last close of the other end, which would discard it
    os.close(stderr)
    os.close(terminal)
    assert process.returncode == 0
    assert re.search(rb"epoch 1:\s+\d+%\|.*\| \d+/18 \[", shown)
    assert b"\x1b[A" not in shown  # one line, not a stack of them
    assert re.fullmatch(r"(\| [^\r\n]+\n|-+\n|=+\n)+", out.decode())
