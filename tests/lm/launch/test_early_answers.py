"""--help and a mistake are answered before the packages are imported that take seconds."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from programs import ROOT, SCRIPTS

SLOW = {"torch", "numpy", "scipy", "matplotlib", "safetensors"}
PROGRAMS = [f"{script}.py" for script in (*SCRIPTS, "compare", "probe", "generate")]


def answer(folder: Path, *words: str) -> tuple[int, str, set[str]]:
    """Return the exit code of a command, the last line of what it says, and the slow packages that it imports."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-X", "importtime", *words]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    found = set(re.findall(r"^import time:.*\| +(\w+)$", done.stderr, re.M))
    said = [line for line in (done.stdout + done.stderr).splitlines() if not line.startswith("import time:")]
    return done.returncode, said[-1], found & SLOW


@pytest.mark.parametrize("flag", ["--help", "--wrong"])
@pytest.mark.parametrize("program", [*PROGRAMS, "roundoff compare RUN"])
def test_a_program_answers_before_it_imports_what_is_slow(tmp_path, program, flag) -> None:
    words = ["-m", *program.split()] if program.startswith("roundoff") else [str(ROOT / program)]
    code, said, slow = answer(tmp_path, *words, flag)
    assert (code, slow) == (0 if flag == "--help" else 2, set())
    assert flag == "--help" or said.startswith("error: unrecognized arguments: --wrong")


@pytest.mark.parametrize("program", ["compare.py", "probe.py"])
def test_a_mistake_in_the_flags_of_the_trainers_is_found_early_too(tmp_path, program) -> None:
    code, said, slow = answer(tmp_path, str(ROOT / program), "--", "--wrong")
    assert (code, slow) == (2, set())
    assert said.startswith("error: unrecognized arguments: --wrong")


def test_a_contradiction_of_options_is_found_early(tmp_path) -> None:
    """Not only a word that no parser knows."""
    code, said, slow = answer(tmp_path, str(ROOT / "main.py"), "--tied", "--nhid", "8")
    assert (code, slow) == (2, set())
    assert said.startswith("error: --tied with --emsize 200 and --nhid 8")
