"""Checkpoints that apex wrote load without apex, and without running anything out of the file."""

import pickle
import sys
from types import ModuleType

import pytest
import torch

import apex_compat
from apex_compat import fp16_utils
from fp16_cases import loss_of, mlp, problem, same, snapshot, train, wrap

AMP_DYNAMIC = {
    "dynamic": True,
    "_loss_scale": 2048.0,
    "_max_loss_scale": 2.0**24,
    "_min_loss_scale": None,
    "_scale_seq_len": 5,
    "_unskipped": 3,
    "_has_overflow": False,
    "_overflow_buf": torch.zeros(1, dtype=torch.int32),
}


def apex_object(module, name, attributes, monkeypatch):
    """Return an instance of a class that pickles as `module`.`name`, which exists while it is saved only."""
    parent = ""
    for part in module.split("."):
        parent = f"{parent}.{part}".lstrip(".")
        if parent not in sys.modules:
            monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
    cls = type(name, (), {"__module__": module})
    monkeypatch.setattr(sys.modules[module], name, cls, raising=False)
    scaler = cls()
    vars(scaler).update(attributes)
    return scaler


def checkpoint_with(scaler_of, path, legacy=False, **changes):
    """Save a checkpoint as a script with apex would; return the optimizer whose state is in it."""
    network = mlp(torch.float16)
    optimizer = wrap(torch.optim.Adam(network.parameters(), lr=0.01), dynamic_loss_scale=True)
    train(network, optimizer, steps=3)
    with pytest.MonkeyPatch.context() as monkeypatch:
        state = optimizer.state_dict() | {"loss_scaler": scaler_of(monkeypatch)} | changes
        checkpoint = {"epoch": 3, "model": network.state_dict(), "optimizer": state, "best": (0.5, ["a"])}
        torch.save(checkpoint, path, _use_new_zipfile_serialization=not legacy)
    assert not any(name.split(".")[0] == "apex" for name in sys.modules)
    return optimizer


def amp_scaler(**changes):
    return lambda patch: apex_object("apex.amp.scaler", "LossScaler", AMP_DYNAMIC | changes, patch)


def old_scaler(name, **attributes):
    return lambda patch: apex_object("apex.fp16_utils.loss_scaler", name, attributes, patch)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_of_the_original_resumes(tmp_path, legacy):
    path = tmp_path / "checkpoint.pt"
    original = checkpoint_with(amp_scaler(), path, legacy)
    checkpoint = apex_compat.load_apex_checkpoint(path)
    assert checkpoint["epoch"] == 3
    assert checkpoint["best"] == (0.5, ["a"])
    network = mlp(torch.float16, seed=9)
    network.load_state_dict(checkpoint["model"])
    optimizer = wrap(torch.optim.Adam(network.parameters(), lr=0.5))
    optimizer.load_state_dict(checkpoint["optimizer"])
    assert same(snapshot(original), snapshot(optimizer))
    assert optimizer.loss_scale == 2048.0
    for i, scale in enumerate([2048.0, 4096.0]):  # 3 good updates of 5 were done
        optimizer.zero_grad()
        optimizer.backward(loss_of(network, *problem(i)))
        assert optimizer.loss_scale == scale


def test_each_scaler_class_becomes_its_policy(tmp_path):
    path = tmp_path / "checkpoint.pt"
    cases = [
        (amp_scaler(), (2048.0, 3, 2.0, 5, None, 2.0**24)),
        (amp_scaler(_min_loss_scale=16.0, _unskipped=0), (2048.0, 0, 2.0, 5, 16.0, 2.0**24)),
        (
            old_scaler(
                "DynamicLossScaler",
                cur_scale=2**20,
                cur_iter=17,
                last_overflow_iter=3,
                scale_factor=4.0,
                scale_window=10,
            ),
            # 13 updates since the overflow: it grew at the 10th, and 3 count towards the next.
            (2.0**20, 3, 4.0, 10, 1.0, 2.0**127),
        ),
    ]
    for scaler_of, expected in cases:
        checkpoint_with(scaler_of, path)
        scaler = apex_compat.load_apex_checkpoint(path)["optimizer"]["loss_scaler"]
        assert tuple(scaler.values()) == expected
    for scaler_of in (
        amp_scaler(dynamic=False, _loss_scale=128.0),
        old_scaler("LossScaler", cur_scale=128.0),
    ):
        checkpoint_with(scaler_of, path, dynamic_loss_scale=False)
        state = apex_compat.load_apex_checkpoint(path)["optimizer"]
        assert state["loss_scaler"] == {"loss_scale": 128.0}
        optimizer = wrap(torch.optim.Adam(mlp(torch.float16).parameters()))
        optimizer.load_state_dict(state)
        assert optimizer.loss_scale == 128.0


def test_the_old_window_counter_resumes_where_it_was(tmp_path):
    for updates in range(1, 12):
        scaler = fp16_utils.DynamicLossScaler(init_scale=2.0**10, scale_factor=2.0, scale_window=4)
        for i in range(updates):
            scaler.update_scale(i == 1)
        checkpoint_with(old_scaler("DynamicLossScaler", **vars(scaler)), tmp_path / "c.pt")
        network = mlp(torch.float16)
        optimizer = wrap(torch.optim.Adam(network.parameters()))
        optimizer.load_state_dict(apex_compat.load_apex_checkpoint(tmp_path / "c.pt")["optimizer"])
        for i in range(9):
            optimizer.zero_grad()
            optimizer.backward(loss_of(network, *problem(i)))
            scaler.update_scale(False)
            assert optimizer.loss_scale == scaler.loss_scale


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_the_file_is_executed(tmp_path, legacy):
    target = tmp_path / "executed"
    checkpoint_with(lambda patch: Bomb(target), tmp_path / "c.pt", legacy)
    with pytest.raises(pickle.UnpicklingError, match="plain values"):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")
    assert not target.exists()
    # A scaler's own attribute is no way in either.
    checkpoint_with(amp_scaler(_overflow_buf=Bomb(target)), tmp_path / "c.pt", legacy)
    with pytest.raises(pickle.UnpicklingError):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")
    assert not target.exists()


def test_other_classes_of_apex_are_refused(tmp_path):
    checkpoint_with(lambda patch: apex_object("apex.amp.opt", "OptimWrapper", {}, patch), tmp_path / "c.pt")
    with pytest.raises(pickle.UnpicklingError, match="OptimWrapper"):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")


def test_a_scaler_without_its_attributes_is_refused(tmp_path):
    checkpoint_with(old_scaler("LossScaler", other=1), tmp_path / "c.pt")
    with pytest.raises(ValueError, match="cur_scale"):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "c.pt").write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(pickle.UnpicklingError, match="plain values"):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")
    with pytest.raises(FileNotFoundError):
        apex_compat.load_apex_checkpoint(tmp_path / "missing.pt")
