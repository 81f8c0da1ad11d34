"""The moments of a run: what torch's hooks and the calls of the file system tell of it, with no name of the loop.

A moment has a name, and comes any number of times:

"train_step" and "evaluation": before the forward pass of a batch; "backward": before its backward pass;
"update": after an optimizer's step; "write F", "fsync F", "replace F", "link F", "unlink F", "chmod F", "mkdir F" and
"open F": before that call for a file that is, or will be, called F; "after replace F" and the like: after it.
"""

import errno
import importlib
import io
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules import module as torch_module
from torch.utils.hooks import RemovableHandle

from lm.model.language_model import RNNModel
from roundoff.precision import Precision, StepResult

Come = Callable[[str], object]
AfterStep = Callable[[int, RNNModel, Precision, StepResult], object]


def watch_batches(
    come: Come,
    seen: Callable[[RNNModel], object] = lambda _: None,
    loss: Callable[[torch.Tensor], object] = lambda _: None,
) -> list[RemovableHandle]:
    """Call `come` with each moment that torch knows of, `seen` with the model before a training batch, `loss` after."""

    def before(module: Any, inputs: Any) -> None:
        if isinstance(module, RNNModel) and inputs[0].any():  # before the first batch each run tries one of zeros
            if module.training:
                seen(module)
            come("train_step" if module.training else "evaluation")

    def after(module: Any, inputs: Any, outputs: Any) -> None:
        if isinstance(module, RNNModel) and module.training and inputs[0].any():
            loss(outputs[0].detach())
            outputs[0].register_hook(lambda _: come("backward"))

    return [
        torch_module.register_module_forward_pre_hook(before),
        torch_module.register_module_forward_hook(after),
        importlib.import_module("torch.optim.optimizer").register_optimizer_step_post_hook(lambda *_: come("update")),
    ]


def after_steps(
    script: str,
    act: AfterStep,
    before: Callable[[], object] = lambda: None,
    begin: Callable[[RNNModel], object] = lambda _: None,
) -> Callable[..., Any]:
    """Return the `fit` of `script`, which calls `begin` once, and `before` and `act` around a precision's steps.

    It is the only hook here that knows of the trainers, and all that it knows is what they hand to `fit`.
    """
    fit = importlib.import_module(script).fit

    def watched(args: Any, corpus: Any, model: RNNModel, precision: Precision, *rest: Any) -> Any:
        take_step, taken = precision.step, 0

        def step(max_norm: float) -> StepResult:
            nonlocal taken
            before()
            result = take_step(max_norm)
            taken += 1
            act(taken, model, precision, result)
            return result

        precision.step = step  # type: ignore[method-assign]
        begin(model)
        return fit(args, corpus, model, precision, *rest)

    return watched


class Disk:
    """The file system of this process from now on: it tells of each call, and can fail.

    Attributes:
        full: no file may grow any more; the first write that is refused is done by half.
        read_only: nothing may be changed any more.
        refuses: the call that is under way fails, and no other.
    """

    def __init__(self, come: Come) -> None:
        self.come = come
        self.full = self.read_only = self.refuses = False
        disk, opened = self, io.open

        class Raw(io.FileIO):
            def write(self, data: Any) -> int:
                was_full = disk.full
                with disk.call("write", self.fileno(), grows=len(data) < 2 or was_full):
                    return super().write(memoryview(data)[: len(data) // 2] if disk.full else data)

        def open_(file: Any, mode: str = "r", *rest: Any, **options: Any) -> Any:
            if not set(mode) & set("wa") or "opener" in options:
                return opened(file, mode, *rest, **options)
            with self.call("open", file):
                binary = io.BufferedWriter(Raw(file, mode.replace("b", "")))
            return binary if "b" in mode else io.TextIOWrapper(binary, "utf-8")

        setattr(io, "open", open_)  # noqa: B010
        for name in ("fsync", "replace", "link", "unlink", "chmod", "mkdir"):
            setattr(os, name, self.watched(name, getattr(os, name), lambda *_: True))
        os.open = self.watched("open", os.open, lambda flags=0, *_: flags & (os.O_WRONLY | os.O_RDWR))

    def watched(self, name: str, original: Callable[..., Any], changes: Callable[..., Any]) -> Callable[..., Any]:
        """Return `original`, which asks this disk before it changes anything."""

        def call(target: Any, *args: Any, **options: Any) -> Any:
            if not changes(*args):
                return original(target, *args, **options)
            with self.call(name, args[0] if name in ("replace", "link") else target):
                return original(target, *args, **options)

        return call

    @contextmanager
    def call(self, name: str, target: Any, grows: bool = False) -> Iterator[None]:
        """Tell of a call before and after it; raise OSError in its place if the disk refuses it."""
        path = Path(f"/proc/self/fd/{target}").readlink() if isinstance(target, int) else Path(target)
        file = re.sub(r"^\.(.+?)\.\w+\.tmp$", r"\1", path.name)
        self.come(f"{name} {file}")
        number = errno.EROFS if self.read_only and name not in ("write", "fsync") else 0
        if self.refuses or (self.full and grows):
            number = errno.ENOSPC
        self.refuses = False
        if number:
            raise OSError(number, os.strerror(number), str(path))
        yield
        self.come(f"after {name} {file}")


def tensors_of(model: RNNModel, precision: Precision) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Return the weights of `model` and the tensors that its optimizer updates."""
    masters = [p for group in precision.param_groups for p in group["params"]]
    return list(model.state_dict().values()), masters
