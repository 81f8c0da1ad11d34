"""Steps on the meta device, where asking for a value raises, and so does a tensor that strayed to another device."""

import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import jobs
from lm.options.modes import DEFAULT_MODES
from lm.training.loop import Training
from roundoff.precision import MasterWeights

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


def meta_kernel(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Let torch's fused AdamW call one that does nothing; return the found-inf tensors that it is given."""
    found = []

    def kernel(params: Any, *_: Any, found_inf: torch.Tensor, **__: Any) -> None:
        assert all(p.is_meta for p in params)
        found.append(found_inf)

    monkeypatch.setattr(torch, "_fused_adamw_", kernel)
    module = importlib.import_module("torch.optim.optimizer")  # torch.optim hides it
    monkeypatch.setattr(module, "_get_fused_kernels_supported_devices", lambda: ["meta"])
    return found


class WaitingSGD(torch.optim.SGD):
    """SGD whose skip has to be decided on the host."""

    def __init__(self, params: Any, lr: float, fused: bool) -> None:
        super().__init__(params, lr=lr, foreach=True)


def meta_job(monkeypatch, tmp_path, corpus, mode: str, optimizer: Any, *flags: str) -> Training:
    monkeypatch.setattr(torch.optim, "SGD", optimizer)
    monkeypatch.setattr("lm.options.resolve.device_of", lambda *_, **__: "meta")
    # autocast does not know the meta device; its casts are not what is tested here, nor the dtypes that come of them
    monkeypatch.setattr("lm.training.preflight.DTYPES_OF_PRODUCTS", set())
    monkeypatch.setattr(torch, "autocast", lambda kind, dtype, enabled: REAL_AUTOCAST("cpu", dtype, enabled=enabled))
    flags += ("--run-dir", str(tmp_path / "run"), "--save", str(tmp_path / "model.safetensors"))
    return jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *flags)


def steps(job: Training, count: int) -> Training:
    """Take steps; these are the only tests that call the loop's own."""
    job.model.train()
    for i in range(count):
        job.train_step(i * job.args.bptt)
    return job


@pytest.mark.parametrize("kind", jobs.mostly_slow(["LSTM", "GRU", "RNN_TANH", "Transformer"], "LSTM"))
@pytest.mark.parametrize("mode", jobs.mostly_slow(jobs.MODES, *DEFAULT_MODES))
def test_no_step_waits_for_the_device(monkeypatch, tmp_path, corpus, mode, kind) -> None:
    job = steps(meta_job(monkeypatch, tmp_path, corpus, mode, DeviceSGD, "--model", kind), 3)
    assert job.records.steps == 3
    with pytest.raises((RuntimeError, NotImplementedError), match=r"[Mm]eta"):
        job.records.flush()  # the one place where the loop waits, once a log interval


@pytest.mark.parametrize("mode", jobs.mostly_slow(jobs.MODES, "manual", "fp16-optimizer-dynamic", "amp-fp16"))
def test_no_step_of_adamw_waits(monkeypatch, tmp_path, corpus, mode) -> None:
    """Nor its check and its skip: the kernel has the verdict as a tensor."""
    found = meta_kernel(monkeypatch)
    steps(meta_job(monkeypatch, tmp_path, corpus, mode, DeviceSGD, "--optimizer", "adamw"), 3)
    assert len(found) == 3
    assert all(flag.is_meta and flag.dtype == torch.float32 for flag in found)


ON_A_GPU = {mode: (mode, []) for mode in jobs.MODES} | {
    f"{mode} {name}": (mode, flags)
    for mode in DEFAULT_MODES
    for name, flags in {
        **{kind: ["--model", kind] for kind in ("GRU", "RNN_TANH", "Transformer")},
        "AdamW": ["--optimizer", "adamw"],
    }.items()
}


@pytest.fixture
def waits_refused() -> Iterator[Callable[[], None]]:
    """What makes it an error to wait for the GPU, until the test ends."""
    yield lambda: torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.cuda
@pytest.mark.filterwarnings("error:.*contiguous chunk of memory")  # else cuDNN copies all weights at each call
@pytest.mark.parametrize("case", ON_A_GPU)
def test_no_step_on_a_gpu_waits_for_it(monkeypatch, tmp_path, corpus, waits_refused, case) -> None:
    """After the first ones, in which optimizers make their state."""
    mode, flags = ON_A_GPU[case]
    where = ["--cuda", "--run-dir", str(tmp_path / "run"), "--save", str(tmp_path / "model.safetensors")]
    job = steps(jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *flags, *where), 3)
    job.records.flush()
    waits_refused()
    steps(job, 3)
    with pytest.raises(RuntimeError, match="synchron"):
        job.records.flush()


@pytest.mark.parametrize("mode", jobs.mostly_slow(jobs.MODES, "manual", "fp16-optimizer-dynamic", "amp-fp16"))
def test_an_optimizer_that_cannot_skip_by_itself_costs_the_wait_that_gradscaler_makes(
    monkeypatch, tmp_path, corpus, mode
) -> None:
    job = meta_job(monkeypatch, tmp_path, corpus, mode, WaitingSGD)
    waits = 0
    real_item = torch.Tensor.item

    def counted_item(tensor: torch.Tensor) -> Any:
        nonlocal waits
        if tensor.device.type != "meta":
            return real_item(tensor)
        waits += 1
        return 0.0

    monkeypatch.setattr(torch.Tensor, "item", counted_item)
    steps(job, 1)
    assert waits == 1


def test_gradients_are_unscaled_by_gradscalers_bits() -> None:
    random = torch.Generator().manual_seed(0)
    scales = torch.cat((torch.rand(300, generator=random) * 60 - 30, torch.tensor([-100.0, 127.0]))).exp2().tolist()
    for scale in scales:
        mine, its = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))
        mine.grad, its.grad = torch.ones(()), torch.ones(())
        MasterWeights([mine], torch.optim.SGD([mine], lr=1.0, fused=True), scale).step(math.inf)
        optimizer = torch.optim.SGD([its], lr=1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(its)
        scaler.unscale_(optimizer)
        assert mine.grad.view(torch.int32) == its.grad.view(torch.int32), scale


def test_no_float64_on_a_device(monkeypatch) -> None:
    """MPS has none."""
    real_double = torch.Tensor.double

    def double(tensor: torch.Tensor) -> torch.Tensor:
        assert not tensor.is_meta
        return real_double(tensor)

    monkeypatch.setattr(torch.Tensor, "double", double)
    weight = torch.nn.Parameter(torch.zeros((), device="meta"))
    precision = MasterWeights([weight], torch.optim.SGD([weight], lr=1.0), 3.0)
    weight.grad = torch.zeros((), device="meta")
    precision.backward(weight.float())
    assert weight.grad.is_meta
