"""What people expect of any command line: versions, groups in the help, and completion."""

import os
import subprocess
import sys

import pytest
import torch

import roundoff
from programs import ROOT, SCRIPTS


@pytest.mark.parametrize("script", [*SCRIPTS, "generate", "compare", "probe"])
def test_version(programs, script):
    done = programs.run(script, "--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{script}.py {roundoff.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_in_groups(programs, script):
    out = programs.run(script, "--help").out
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", "data", "model", "training", "precision", "records"]
    assert f"With Sacred: {script}.py [COMMAND]" in out


@pytest.mark.slow
def test_the_shell_completes_flags_and_choices(tmp_path):
    """As the shell asks: the line so far in the environment, the answer in a file."""
    answer = tmp_path / "answer"
    line = "main.py --model "
    asks = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": answer,
    }
    environment = os.environ | {name: str(value) for name, value in asks.items()}
    subprocess.run([sys.executable, ROOT / "main.py"], env=environment, cwd=tmp_path, timeout=120, check=False)
    assert answer.read_text().replace("\x0b", " ").replace("\x0d", " ").split() == [
        "RNN_TANH",
        "RNN_RELU",
        "LSTM",
        "GRU",
        "Transformer",
    ]


@pytest.mark.parametrize("script", [*SCRIPTS, "generate", "compare", "probe"])
def test_argcomplete_finds_its_mark(script):
    assert b"PYTHON_ARGCOMPLETE_OK" in (ROOT / f"{script}.py").read_bytes()[:1024]
