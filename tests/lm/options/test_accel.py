"""--accel: the accelerator that torch names, or one clear line."""

from contextlib import suppress

import pytest
import torch

from lm.model.language_model import RNNModel
from lm.options.config import parse_args
from lm.options.device import find_accelerator, find_device
from roundoff.device import random_state_kept
from roundoff.errors import UsageError


def accelerator(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    """Let this machine have an accelerator of that kind."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: found)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: found is not None)
    if kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 1)
        monkeypatch.setattr(torch.cuda, "init", lambda: None)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_the_one_that_is_there(monkeypatch, kind) -> None:
    accelerator(monkeypatch, kind)
    assert parse_args("main.py", "", ["--accel"]).device == kind
    assert find_accelerator(f"{kind}:0") == f"{kind}:0"
    assert parse_args("main.py", "", []).device == "cpu"


@pytest.mark.parametrize(
    ("kind", "name", "said"),
    [
        (None, None, "--accel: torch finds no accelerator here; to run on the CPU"),
        ("hpu", None, "--accel: hpu is not supported"),
        ("mps", "cpu", r"--accel \(mps\) and --device cpu contradict"),
    ],
)
def test_mistakes(monkeypatch, kind, name, said) -> None:
    accelerator(monkeypatch, kind)
    with pytest.raises(UsageError, match=said):
        find_accelerator(name)


@pytest.mark.parametrize("kind", ["cuda", "xpu", "mps"])
def test_text_is_written_there_too(monkeypatch, saved, kind) -> None:
    """Up to the point where the model would go there."""
    accelerator(monkeypatch, kind)
    asked: list[str] = []

    def stop(self: RNNModel, device: str) -> RNNModel:
        asked.append(device)
        raise KeyboardInterrupt

    monkeypatch.setattr(RNNModel, "to", stop)
    for flags in (["--accel"], ["--device", kind], [f"--device={kind}:0", "--accel"], ["--device", "cpu"], []):
        assert saved.run("generate", *flags).code == 130
    assert asked == [kind, kind, f"{kind}:0", "cpu", "cpu"]


def test_mistakes_of_generate(saved) -> None:
    assert "--device 'gpu' is no device" in saved.refuse("generate", "--device", "gpu")
    assert "--cuda and --device cpu contradict" in saved.refuse("generate", "--device", "cpu", "--cuda")


class Generator:
    """An accelerator's random numbers, for a torch that was built without it."""

    def __init__(self) -> None:
        self.state = torch.tensor([1, 2, 3], dtype=torch.uint8)

    def get_rng_state(self, *_: torch.device) -> torch.Tensor:
        return self.state.clone()

    def set_rng_state(self, state: torch.Tensor, *_: torch.device) -> None:
        self.state = state


@pytest.mark.parametrize("kind", ["cpu", "cuda", "xpu", "mps"])
def test_random_state_kept(monkeypatch, kind) -> None:
    generator = Generator()
    monkeypatch.setattr(torch, "get_device_module", lambda _: generator)
    before = torch.get_rng_state()
    with suppress(KeyboardInterrupt), random_state_kept(kind):
        torch.rand(3)
        generator.state += 1
        raise KeyboardInterrupt
    assert torch.equal(torch.get_rng_state(), before)
    assert generator.state.tolist() == ([2, 3, 4] if kind == "cpu" else [1, 2, 3])


def test_cuda_is_asked_for_and_xpu_is_there(monkeypatch) -> None:
    accelerator(monkeypatch, "xpu")
    with pytest.raises(UsageError, match="--cuda and --device xpu contradict"):
        parse_args("main.py", "", ["--accel", "--cuda"])


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_device_that_is_not_there(monkeypatch, kind) -> None:
    monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 0)
    with pytest.raises(UsageError, match=f"--device {kind}: torch finds no {kind} device here"):
        find_device(kind)


def test_a_torch_without_cuda_is_not_a_machine_without_a_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch, "__version__", "2.13.0+cpu")
    for cuda, reason in (
        (None, ", since torch 2.13.0.cpu is built without CUDA: for a GPU install a build"),
        ("13.0", ";"),
    ):
        monkeypatch.setattr(torch.version, "cuda", cuda)
        with pytest.raises(UsageError, match=f"--cuda: torch finds no CUDA GPU here{reason}"):
            find_device(None, cuda=True)


def test_a_driver_that_is_too_old(monkeypatch) -> None:
    """NVML counts the GPUs all the same."""

    def refuse() -> None:
        raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\nPlease update it")

    accelerator(monkeypatch, "cuda")
    monkeypatch.setattr(torch.cuda, "init", refuse)
    said = r"--device cuda:0: CUDA does not start \(The NVIDIA driver .* 11040\).\); to run on the CPU"
    with pytest.raises(UsageError, match=said):
        find_device("cuda:0")
