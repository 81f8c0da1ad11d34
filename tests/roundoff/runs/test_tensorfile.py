"""The reader of tensor files: it gives back what was saved, in bounded memory, and refuses what is no file."""

import math
import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from bounded import needs_bounds, read_bounded
from checkpoints import SETUPS, content, same
from hostile import saved
from hostile_sizes import CLAIMS, CONTENTS, DAMAGED
from programs import make_model
from roundoff.errors import BadFileError
from roundoff.program import exit_code
from roundoff.runs.tensorfile import load_tensors


def load(path: Path, value: Any) -> Any:
    torch.save(value, path)
    return load_tensors(path)


@pytest.mark.parametrize("setup", SETUPS)
def test_what_a_resume_needs_comes_back(tmp_path: Path, setup: str) -> None:
    """Model, masters, optimizer, loss scale and random generators of each precision mode."""
    whole = content(setup)
    assert same(load(tmp_path / "file", whole), whole)


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        -(2**63),
        2**63 - 1,
        math.inf,
        5e-324,
        "日本\n\0",
        (),
        [(), [], {}, OrderedDict()],
        {1: {"a": [(1, 2.5, None)]}, "b": False},
        torch.tensor(3.0),
        torch.empty(0, 5),
        torch.arange(12.0).view(3, 4).t(),
        torch.arange(12)[3:9:2],
        torch.ones(3, requires_grad=True),
    ],
    ids=repr,
)
def test_values_come_back(tmp_path: Path, value: Any) -> None:
    assert same(load(tmp_path / "file", value), value)


def test_nan_comes_back(tmp_path: Path) -> None:
    assert math.isnan(load(tmp_path / "file", math.nan))


def test_tied_tensors_share_their_storage_again(tmp_path: Path) -> None:
    state = load(tmp_path / "file", make_model(tied=True).state_dict())
    assert state["encoder.weight"].data_ptr() == state["decoder.weight"].data_ptr()
    assert state._metadata == make_model(tied=True).state_dict()._metadata


def test_a_file_with_its_own_name_inside(tmp_path: Path) -> None:
    """Given a path, torch.save names the folder in the archive after it."""
    torch.save([1], tmp_path / "schön.pt")
    assert load_tensors(tmp_path / "schön.pt") == [1]


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {"": "no regular file", "pipe": "no regular file", "loop": "cannot be read: .*symbolic"}.items():
        with pytest.raises(BadFileError, match=said):
            load_tensors(tmp_path / name)


def test_a_read_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    torch.save([1], tmp_path / "file")
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(BadFileError, match=r"^it cannot be read: Input/output error$"):
        load_tensors(tmp_path / "file")


def test_a_file_larger_than_the_memory(tmp_path: Path, monkeypatch, capsys) -> None:
    """It may be a good one."""

    def fail(*_: Any, **__: Any) -> None:
        raise MemoryError

    torch.save([1], tmp_path / "file")
    monkeypatch.setattr(torch, "load", fail)
    assert exit_code(lambda: load_tensors(tmp_path / "file")) == 1
    assert capsys.readouterr().err == "error: out of memory\n"


@pytest.mark.slow
@needs_bounds
def test_hostile_files_take_no_memory(tmp_path: Path) -> None:
    """100 MiB, for files of up to 16 MiB that claim up to terabytes; and for one that has a terabyte of zeros."""
    hostile = [*DAMAGED.values(), *CLAIMS.values(), *CONTENTS.values()]
    paths = [tmp_path / f"{i}.pt" for i in range(len(hostile))]
    for path, file in zip(paths, hostile, strict=True):
        path.write_bytes(file.make(tmp_path / "canary"))
    good, huge = tmp_path / "good.pt", tmp_path / "huge.pt"
    good.write_bytes(saved(content("amp")))
    huge.write_bytes(good.read_bytes())
    os.truncate(huge, 2**40)
    said = read_bounded(100, good, *paths, huge)
    assert (said[0], said[-1], len(said)) == ("read", "refused", len(hostile) + 2)


@needs_bounds
@pytest.mark.slow
def test_a_large_file_takes_three_times_its_size(tmp_path: Path) -> None:
    torch.save(torch.zeros(2), tmp_path / "small.pt")
    torch.save([torch.zeros(2**20) for _ in range(16)], tmp_path / "large.pt")
    assert read_bounded(3 * 64, tmp_path / "small.pt", tmp_path / "large.pt") == ["read", "read"]
