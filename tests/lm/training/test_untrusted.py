"""Hostile files: nothing in them is executed, and each gets one clear line and the exit code of a mistake."""

import re
from contextlib import suppress
from pathlib import Path

import pytest
import roundoff.runs.pickle_check
import roundoff.runs.tensorfile
import torch
from hostile_sizes import COUNT, MODELS
from roundoff.runs.tensorfile import load_tensors

from hostile import COMMANDS
from programs import Programs
from roundoff.errors import BadFileError


@pytest.fixture(autouse=True)
def few_values(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that files with too many are made and refused in less time."""
    for module in (roundoff.runs.pickle_check, roundoff.runs.tensorfile):
        monkeypatch.setattr(module, "MAX_VALUES", 2**18)


@pytest.mark.parametrize("name", MODELS)
def test_a_hostile_model(programs: Programs, name: str) -> None:
    canary = programs.folder / "canary"
    hostile = MODELS[name]
    (programs.folder / "model.safetensors").write_bytes(hostile.make(canary))
    error = programs.refuse("generate", "--words", "5")  # and nothing was made, the canary least of all
    assert error.startswith("error: --checkpoint"), error
    assert re.search(hostile.said, error), error
    assert error[:-1].isprintable()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_would_have_run(tmp_path: Path, name: str) -> None:
    """The file is as bad as it is meant to be."""
    (tmp_path / "model.safetensors").write_bytes(COMMANDS[name].make(tmp_path / "canary"))
    with pytest.raises(BadFileError, match=r"^[ -~]{10,150}$"):
        load_tensors(tmp_path / "model.safetensors")
    assert not (tmp_path / "canary").exists()
    with suppress(TypeError, AttributeError, RuntimeError):  # over what the command returned
        torch.load(tmp_path / "model.safetensors", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_how_many() -> None:
    """The README quotes this number."""
    assert COUNT == 237
