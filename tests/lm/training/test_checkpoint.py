"""Files appear whole or not at all, and give back what was put in."""

import errno
import os
import stat

import pytest
import safetensors.torch
import torch

from lm.model.language_model import KINDS, RNNModel
from lm.model.model_file import load_model, save_model
from roundoff.errors import UsageError
from roundoff.runs.files import check_writable, write_atomically


class FullDiskError(OSError):
    """Raised in the middle of a write."""


def write_half(file) -> None:
    file.write(b"half of it")
    raise FullDiskError(errno.ENOSPC, "No space left on device")


def test_a_new_file_is_written(tmp_path):
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"content"


def test_an_old_file_is_replaced(tmp_path):
    (tmp_path / "file").write_bytes(b"a longer old content")
    write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    assert (tmp_path / "file").read_bytes() == b"new"


def test_a_reader_of_the_old_file_keeps_it(tmp_path):
    """Nothing is written into the old file."""
    (tmp_path / "file").write_bytes(b"old")
    with (tmp_path / "file").open("rb") as reader:
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
        assert reader.read() == b"old"


@pytest.mark.parametrize("failure", [FullDiskError, KeyboardInterrupt, RuntimeError])
def test_a_writer_that_fails_leaves_the_old_file_alone(tmp_path, failure):
    (tmp_path / "file").write_bytes(b"old")

    def fail(file) -> None:
        file.write(b"half of it")
        raise failure

    with pytest.raises(failure):
        write_atomically(tmp_path / "file", fail)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_a_writer_that_fails_leaves_no_new_file(tmp_path):
    with pytest.raises(FullDiskError) as failed:
        write_atomically(tmp_path / "file", write_half)
    assert failed.value.filename == str(tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_system_that_fails_leaves_the_old_file_alone(tmp_path, monkeypatch, step):
    (tmp_path / "file").write_bytes(b"old")

    def fail(*_) -> None:
        raise FullDiskError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(FullDiskError):
        write_atomically(tmp_path / "file", lambda file: file.write(b"new"))
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_the_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    """Or a crash could leave an empty file in the old one's place."""
    events = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append(os.fstat(fd).st_size), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b, **k: (events.append("replace"), replace(a, b, **k)))
    write_atomically(tmp_path / "file", lambda file: file.write(b"content"))
    assert events[:2] == [7, "replace"]


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_others_may_read_what_the_umask_lets_them(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_atomically(tmp_path / "file", lambda file: file.write(b""))
    finally:
        assert os.umask(before) == umask
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == mode


def test_a_link_keeps_pointing_to_the_file(tmp_path):
    """People link model.safetensors to a larger disk."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "file")
    write_atomically(tmp_path / "link", lambda file: file.write(b"content"))
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_bytes() == b"content"


def test_check_writable_leaves_nothing_behind(tmp_path):
    (tmp_path / "old").write_bytes(b"old")
    check_writable("--save", tmp_path / "old")
    check_writable("--save", tmp_path / "new")
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old").read_bytes() == b"old"


@pytest.mark.parametrize("place", ["", "nowhere/file", "file/below"])
def test_check_writable_refuses(tmp_path, place):
    (tmp_path / "file").write_bytes(b"old")
    with pytest.raises(UsageError, match=r"^--save [^\n]+$"):
        check_writable("--save", tmp_path / place)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def make_model(kind: str = "LSTM", tied: bool = False, seed: int = 0) -> RNNModel:
    torch.manual_seed(seed)
    return RNNModel(kind, 16, 8, 8, 2, 0.3, tied)


WORDS = [f"wörd{i}" for i in range(11)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_comes_back_exactly(tmp_path, kind, tied, dtype):
    model = make_model(kind, tied).to(dtype)
    save_model(tmp_path / "model.safetensors", model, WORDS)
    loaded, vocabulary = load_model(tmp_path / "model.safetensors")
    assert vocabulary == WORDS
    assert loaded.options == model.options == {
        "kind": kind, "ntokens": 16, "emsize": 8, "nhid": 8, "nlayers": 2, "dropout": 0.3, "tied": tied,
    } | ({"nhead": 2, "context": 35} if kind == "Transformer" else {})  # fmt: skip
    assert (loaded.decoder.weight is loaded.encoder.weight) is tied
    weights = loaded.state_dict()
    for name, weight in model.state_dict().items():
        assert weights[name].dtype == torch.float32
        assert weights[name].device.type == "cpu"
        assert torch.equal(weights[name], weight.float())
    assert all(parameter.requires_grad for parameter in loaded.parameters())
    logits, _ = loaded(torch.zeros((2, 3), dtype=torch.int64), loaded.init_hidden(3))
    assert logits.shape == (2, 3, 16)


def test_other_programs_can_read_the_weights(tmp_path):
    model = make_model()
    save_model(tmp_path / "any name", model, WORDS)
    weights = safetensors.torch.load_file(tmp_path / "any name")
    assert weights.keys() == {f"weights.{name}" for name in model.state_dict()}
    assert all(torch.equal(weights[f"weights.{name}"], weight) for name, weight in model.state_dict().items())


def test_a_tied_model_is_saved_once(tmp_path):
    for tied in (False, True):
        save_model(tmp_path / f"{tied}", make_model(tied=tied), WORDS)
    untied, tied = ((tmp_path / name).stat().st_size for name in ("False", "True"))
    assert untied - tied > 16 * 8 * 4 - 100


def test_a_save_that_fails_keeps_the_best_model(tmp_path, monkeypatch):
    best = make_model()
    save_model(tmp_path / "model.safetensors", best, WORDS)

    def full(path, write, keep) -> None:
        write_atomically(path, write_half, keep)

    monkeypatch.setattr("roundoff.runs.tensor_file.write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        save_model(tmp_path / "model.safetensors", make_model(seed=1), WORDS)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_model(tmp_path / "model.safetensors")[0].encoder.weight, best.encoder.weight)
