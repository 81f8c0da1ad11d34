"""Checkpoints that apex wrote load without apex, and without running anything out of the file."""

import pickle
import sys
from types import ModuleType

import pytest
import torch

import apex_compat
from apex_compat import fp16_utils
from checkpoints import torch_saved_on_gpu
from fp16_cases import loss_of, mlp, problem, same, snapshot, train, wrap


def apex_object(name, **attributes):
    """Return a function that makes an object which pickles as apex's `name`."""

    def make(monkeypatch):
        module, _, cls_name = f"apex.{name}".rpartition(".")
        parts = module.split(".")
        for parent in (".".join(parts[: i + 1]) for i in range(len(parts))):
            if parent not in sys.modules:
                monkeypatch.setitem(sys.modules, parent, ModuleType(parent))
        cls = type(cls_name, (), {"__module__": module})
        monkeypatch.setattr(sys.modules[module], cls_name, cls, raising=False)
        made = cls()
        vars(made).update(attributes)
        return made

    return make


def amp_scaler(**changes):
    attributes = {"dynamic": True, "_loss_scale": 2048.0, "_max_loss_scale": 2.0**24, "_min_loss_scale": None}
    attributes |= {"_scale_seq_len": 5, "_unskipped": 3, "_has_overflow": False, "_overflow_buf": torch.zeros(1).int()}
    return apex_object("amp.scaler.LossScaler", **attributes | changes)


def old_scaler(name, **attributes):
    return apex_object(f"fp16_utils.loss_scaler.{name}", **attributes)


def old_dynamic(factor, window, cur_iter, last_overflow_iter, scale=2**20):
    policy = {"scale_factor": factor, "scale_window": window}
    counts = {"cur_iter": cur_iter, "last_overflow_iter": last_overflow_iter}
    return old_scaler("DynamicLossScaler", cur_scale=scale, **policy, **counts)


@pytest.fixture
def saved(tmp_path):
    """Return a function that saves a checkpoint as a script with apex would, and returns its path and optimizer."""

    def save(scaler_of, legacy=False, on_gpu=False, **changes):
        network = mlp(torch.float16)
        optimizer = wrap(torch.optim.Adam(network.parameters(), lr=0.01), dynamic_loss_scale=True)
        train(network, optimizer, steps=3)
        with pytest.MonkeyPatch.context() as monkeypatch:
            state = optimizer.state_dict() | {"loss_scaler": scaler_of(monkeypatch)} | changes
            checkpoint = {"epoch": 3, "model": network.state_dict(), "optimizer": state, "best": (0.5, ["a"])}
            if on_gpu:
                whole = torch_saved_on_gpu(checkpoint, _use_new_zipfile_serialization=not legacy)
                (tmp_path / "c.pt").write_bytes(whole)
            else:
                torch.save(checkpoint, tmp_path / "c.pt", _use_new_zipfile_serialization=not legacy)
        assert not any(name.split(".")[0] == "apex" for name in sys.modules)
        return tmp_path / "c.pt", optimizer

    return save


@pytest.mark.parametrize("on_gpu", [False, True], ids=["CPU", "cuda:0"])
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
def test_a_checkpoint_of_apex_resumes(saved, legacy, on_gpu):
    path, original = saved(amp_scaler(), legacy, on_gpu)
    checkpoint = apex_compat.load_apex_checkpoint(path)
    assert (checkpoint["epoch"], checkpoint["best"]) == (3, (0.5, ["a"]))
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


@pytest.mark.parametrize(
    ("scaler_of", "expected"),
    [
        (amp_scaler(), (2048.0, 3, 2.0, 5, None, 2.0**24)),
        (amp_scaler(_min_loss_scale=16.0, _unskipped=0), (2048.0, 0, 2.0, 5, 16.0, 2.0**24)),
        # 13 updates since the overflow: it grew at the 10th, and 3 count towards the next.
        (old_dynamic(4.0, 10, cur_iter=17, last_overflow_iter=3), (2.0**20, 3, 4.0, 10, 1.0, 2.0**127)),
        (amp_scaler(dynamic=False, _loss_scale=128.0), (128.0,)),
        (old_scaler("LossScaler", cur_scale=128.0), (128.0,)),
    ],
)
def test_each_scaler_class_becomes_its_policy(saved, scaler_of, expected):
    path, _ = saved(scaler_of, dynamic_loss_scale=len(expected) > 1)
    state = apex_compat.load_apex_checkpoint(path)["optimizer"]
    keys = ("loss_scale", "good_updates", "scale_factor", "scale_window", "min_loss_scale", "max_loss_scale")
    assert state["loss_scaler"] == dict(zip(keys, expected, strict=False))
    optimizer = wrap(torch.optim.Adam(mlp(torch.float16).parameters()))
    optimizer.load_state_dict(state)
    assert optimizer.loss_scale == expected[0]


def test_the_old_window_counter_resumes_where_it_was(saved):
    for updates in range(1, 12):
        scaler = fp16_utils.DynamicLossScaler(init_scale=2.0**10, scale_factor=2.0, scale_window=4)
        for i in range(updates):
            scaler.update_scale(i == 1)
        path, _ = saved(old_scaler("DynamicLossScaler", **vars(scaler)))
        network = mlp(torch.float16)
        optimizer = wrap(torch.optim.Adam(network.parameters()))
        optimizer.load_state_dict(apex_compat.load_apex_checkpoint(path)["optimizer"])
        for i in range(9):
            optimizer.zero_grad()
            optimizer.backward(loss_of(network, *problem(i)))
            scaler.update_scale(False)
            assert optimizer.loss_scale == scaler.loss_scale


@pytest.mark.parametrize("legacy", [False, True])
def test_map_location_is_torchs(saved, legacy):
    """Such a file comes from a GPU. Whoever asks for the GPU that is not here is told so by torch."""
    path, _ = saved(amp_scaler(), legacy, on_gpu=True)
    plain = apex_compat.load_apex_checkpoint(path)
    for places in ("cpu", torch.device("cpu"), {"cuda:0": "cpu"}, lambda storage, place: storage):
        checkpoint = apex_compat.load_apex_checkpoint(path, map_location=places)
        assert same(checkpoint["model"], plain["model"])
        assert {weight.device.type for weight in checkpoint["model"].values()} == {"cpu"}
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CPU-only machine"):
            apex_compat.load_apex_checkpoint(path, map_location=None)


class Bomb:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return (open, (str(self.target), "w"))


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_the_file_is_executed(saved, tmp_path, legacy):
    bomb = Bomb(tmp_path / "executed")
    for scaler_of in (lambda patch: bomb, amp_scaler(_overflow_buf=bomb)):  # a scaler's own attribute is no way in
        with pytest.raises(pickle.UnpicklingError, match="plain values"):
            apex_compat.load_apex_checkpoint(saved(scaler_of, legacy)[0])
        assert not bomb.target.exists()


def test_other_files_are_refused(saved, tmp_path):
    with pytest.raises(pickle.UnpicklingError, match="OptimWrapper"):
        apex_compat.load_apex_checkpoint(saved(apex_object("amp.opt.OptimWrapper"))[0])
    with pytest.raises(ValueError, match="cur_scale"):
        apex_compat.load_apex_checkpoint(saved(old_scaler("LossScaler", other=1))[0])
    (tmp_path / "c.pt").write_bytes(b"\x80\x02not a checkpoint")
    with pytest.raises(pickle.UnpicklingError, match="plain values"):
        apex_compat.load_apex_checkpoint(tmp_path / "c.pt")
    with pytest.raises(FileNotFoundError):
        apex_compat.load_apex_checkpoint(tmp_path / "missing.pt")
