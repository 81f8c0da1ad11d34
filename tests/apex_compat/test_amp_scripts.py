"""Scripts in the style of apex.amp's most common users run unchanged through `python -m apex_compat`."""

import importlib.util

import pytest

from amp_cases import torch_as_it_was  # noqa: F401
from amp_scripts import COMMON, SCRIPTS
from apex_compat.__main__ import main

ARGUMENTS = {"transformers": ["--fp16_opt_level", "O2"]}


def run(path, text, arguments, capsys):
    path.write_text(COMMON + text, encoding="utf-8")
    code = main(["--device", "cpu", str(path), *arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert captured.out.splitlines()[-1] == "done"


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_unchanged(name, tmp_path, capsys):
    if name == "swav" and importlib.util.find_spec("apex_compat.parallel") is None:
        pytest.skip("apex_compat.parallel, which this script imports, does not exist")
    run(tmp_path / "script.py", SCRIPTS[name], ARGUMENTS.get(name, []), capsys)


def test_a_script_runs_at_its_default_level_too(tmp_path, capsys):
    run(tmp_path / "script.py", SCRIPTS["transformers"], [], capsys)
