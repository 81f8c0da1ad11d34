"""Ctrl-C as a user sends it, and the progress bar, which is for terminals only."""

import fcntl
import os
import re
import signal
import struct
import termios

import pytest

from lm.model.model_file import load_model
from programs import BATCHES, HALF, MODEL, TINY, read_run, start, write_corpus
from runs import act_at

LINES = r"(\| [^\r\n]+\n|-+\n|=+\n|Exiting from training early\n)+"
"""The documented lines, and no byte of a progress bar."""


def test_a_run_leaves_no_handler_behind(programs):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with act_at(7, lambda: signal.raise_signal(signal.SIGINT)):
        done = programs.run("main", *TINY)
    assert (done.code, done.err) == (0, "")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    run = read_run(programs.folder / "run")
    assert (run.result["status"], len(run.steps), run.epochs) == ("interrupted", 7, [])
    assert run.result["tokens_per_second"] > 0
    assert f"| test loss {run.result['test_loss']:5.2f} | test ppl {run.result['test_ppl']:8.2f}\n" in done.out


def read_until(stream, text: bytes) -> bytes:
    """What the process printed up to the line with `text`."""
    lines = b""
    for line in stream:
        lines += line
        if text in line:
            return lines
    raise AssertionError(f"{text!r} never came:\n{lines.decode()}")


@pytest.mark.slow
@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_as_a_user_sends_it(programs, times):
    """In a pipe; a second one during a test evaluation that would take long."""
    write_corpus(programs.folder / "big", test=200_000 if times == 2 else 9)
    flags = [*TINY, "--data", "big", "--fp16", "--epochs", "1000000", "--log-interval", "5", "--bptt", "5"]
    process = start(programs.folder, "main", *flags, stdout=-1, stderr=-1)
    try:
        out = read_until(process.stdout, b"| epoch   2 |    10/   17 batches |")
        process.send_signal(signal.SIGINT)
        if times == 2:
            out += read_until(process.stdout, b"Exiting from training early")
            process.send_signal(signal.SIGINT)
        rest, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert (process.returncode, err) == (0 if times == 1 else 130, b"")
    assert (b"| End of training | test loss " in rest) == (times == 1)
    assert re.fullmatch(LINES, (out + rest).decode())
    run = read_run(programs.folder / "run")
    assert run.result["status"] == "interrupted"
    assert BATCHES + 10 <= run.result["steps"] == len(run.steps)
    assert len(load_model(programs.folder / MODEL)[1]) == 18


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
    assert re.fullmatch(LINES, out.decode())
