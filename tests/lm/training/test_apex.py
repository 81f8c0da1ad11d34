"""`--fp16-utils apex`: NVIDIA's own FP16_Optimizer gives Python numbers where this project's gives tensors."""

import shutil
import sys
from types import ModuleType
from typing import Any

import pytest

import jobs
from apex_compat.fp16_utils import FP16_Optimizer
from programs import TINY
from runs import kill_at, outcome, resume


class Scaler:
    """The original's loss scaler is an object of its own class, which `weights_only=True` would refuse."""


class ApexLike:
    """The surface of the original that the trainers use, with its Python numbers, over this project's optimizer."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._own = FP16_Optimizer(*args, **kwargs)
        self.optimizer = self._own  # an inner optimizer, whose groups are the same
        self.param_groups = self._own.param_groups
        self.backward = self._own.backward
        self.update_master_grads = self._own.update_master_grads
        self.step = self._own.step
        self.loss_scaler = Scaler()

    @property
    def loss_scale(self) -> float:
        return self._own.loss_scale

    def state_dict(self) -> dict[str, Any]:
        state = self._own.state_dict()
        vars(self.loss_scaler).update(state["loss_scaler"])
        return state | {"loss_scaler": self.loss_scaler}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.loss_scaler = state["loss_scaler"]
        self._own.load_state_dict(state | {"loss_scaler": vars(self.loss_scaler)})

    def clip_master_grads(self, max_norm: float) -> float:
        return float(self._own.clip_master_grads(max_norm))


@pytest.fixture
def apex_like(monkeypatch):
    apex_fp16_utils = ModuleType("apex.fp16_utils")
    apex_fp16_utils.FP16_Optimizer = ApexLike
    monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.fp16_utils", apex_fp16_utils)


@pytest.mark.usefixtures("apex_like")
@pytest.mark.parametrize(
    "flags",
    [["--static-loss-scale", "256"], ["--dynamic-loss-scale", "--init-scale", "1e6", "--scale-window", "10"]],
    ids=["static", "dynamic"],
)
def test_an_installed_apex_is_used_and_records_the_same(monkeypatch, tmp_path, corpus, flags) -> None:
    flags = ["--fp16", "--max-steps", "30", *flags]
    assert jobs.run(monkeypatch, corpus, tmp_path / "own", "main_fp16_optimizer", *flags) == 0
    flags += ["--fp16-utils", "apex"]
    assert jobs.run(monkeypatch, corpus, tmp_path / "apex", "main_fp16_optimizer", *flags) == 0
    assert jobs.rows(tmp_path / "apex") == jobs.rows(tmp_path / "own")
    skipped = sum(not row["applied"] for row in jobs.rows(tmp_path / "apex"))
    assert (skipped > 0) == ("--dynamic-loss-scale" in flags)


@pytest.mark.usefixtures("apex_like")
def test_a_run_with_apex_is_resumed(programs):
    flags = [*TINY, "--fp16", "--dynamic-loss-scale", "--scale-window", "4", "--fp16-utils", "apex"]
    assert programs.run("main_fp16_optimizer", *flags).code == 0
    expected = outcome(programs.folder)
    shutil.rmtree("run")
    kill_at(programs, 30, "main_fp16_optimizer", *flags, "--checkpoint-interval", "5")
    resume(programs, "main_fp16_optimizer")
    assert outcome(programs.folder) == expected


@pytest.mark.parametrize(("there", "said"), [(True, "NVIDIA removed it in May 2025"), (False, "apex.fp16_utils")])
def test_what_is_not_there_is_said_clearly(programs, monkeypatch, there, said) -> None:
    """An apex without fp16_utils, and none at all."""
    if there:
        monkeypatch.setitem(sys.modules, "apex", ModuleType("apex"))
    assert said in programs.refuse("main_fp16_optimizer", *TINY, "--fp16-utils", "apex")
