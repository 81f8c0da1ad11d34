"""Steps on the meta device, where asking for a value raises, and so does a tensor that strayed to another device."""

from typing import Any

import pytest
import torch

import jobs
from lm.train import Training

REAL_AUTOCAST = torch.autocast


class DeviceSGD(torch.optim.Optimizer):
    """SGD that skips on the device, as torch's fused one does, which has no meta kernel."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float, fused: bool) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None, grad_scale: Any = None) -> None:
        keep = 1 - self.found_inf
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(p.grad * keep * group["lr"])


class WaitingSGD(torch.optim.SGD):
    """SGD whose skip has to be decided on the host."""

    def __init__(self, params: Any, lr: float, fused: bool) -> None:
        super().__init__(params, lr=lr, foreach=True)


def meta_job(monkeypatch, tmp_path, corpus, mode: str, optimizer: Any, *flags: str) -> Training:
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    monkeypatch.setattr("lm.config.find_device", lambda *_, **__: "meta")
    # autocast does not know the meta device; its casts are not what is tested here
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: REAL_AUTOCAST("cpu", dtype, enabled=enabled))
    flags += ("--run-dir", str(tmp_path / "run"), "--save", str(tmp_path / "model.pt"))
    return jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *flags)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH", "Transformer"])
@pytest.mark.parametrize("mode", jobs.MODES)
def test_no_step_waits_for_the_device(monkeypatch, tmp_path, corpus, mode, kind) -> None:
    job = meta_job(monkeypatch, tmp_path, corpus, mode, DeviceSGD, "--model", kind)
    job.model.train()
    for i in range(3):
        job.train_step(i * job.args.bptt)
    assert job.records.steps == 3
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        job.records.flush()  # the one place where the loop waits, once a log interval


@pytest.mark.parametrize("mode", jobs.MODES)
def test_an_optimizer_that_cannot_skip_by_itself_costs_the_wait_that_gradscaler_makes(
    monkeypatch, tmp_path, corpus, mode
) -> None:
    job = meta_job(monkeypatch, tmp_path, corpus, mode, WaitingSGD)
    job.model.train()
    waits = 0
    real_item = torch.Tensor.item

    def counted_item(tensor: torch.Tensor) -> Any:
        nonlocal waits
        if tensor.device.type != "meta":
            return real_item(tensor)
        waits += 1
        return 0.0

    monkeypatch.setattr(torch.Tensor, "item", counted_item)
    job.train_step(0)
    assert waits == 1
