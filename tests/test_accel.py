"""--accel: the accelerator that torch names, or one clear line."""

import pytest
import torch

from lm.config import parse_args
from lm.device import find_accelerator, find_device
from lm.errors import UsageError


def accelerator(monkeypatch: pytest.MonkeyPatch, kind: str | None) -> None:
    """Let this machine have an accelerator of that kind."""
    found = None if kind is None else torch.device(kind)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: found)
    if kind in ("cuda", "xpu", "mps"):
        monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 1)


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


def test_cuda_is_asked_for_and_xpu_is_there(monkeypatch) -> None:
    accelerator(monkeypatch, "xpu")
    with pytest.raises(UsageError, match="--cuda and --device xpu contradict"):
        parse_args("main.py", "", ["--accel", "--cuda"])


@pytest.mark.parametrize("kind", ["xpu", "mps"])
def test_a_device_that_is_not_there(monkeypatch, kind) -> None:
    monkeypatch.setattr(torch.get_device_module(kind), "device_count", lambda: 0)
    with pytest.raises(UsageError, match=f"--device {kind}: torch finds no {kind} device here"):
        find_device(kind)
