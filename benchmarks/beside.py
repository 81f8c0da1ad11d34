"""A process of its own for what is measured, which works when it is told to and waits otherwise.

The trainers set how the C library keeps memory, for their whole process. The reference would be faster in such a
process, and so no reference. Several processes still run in turn, call by call, on the same processors.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any

import torch

from benchmarks import reference
from benchmarks.measure import synchronise
from lm.data.corpus import batchify
from roundoff.device import set_tf32

EVALUATION_BATCHES = 4

Calls = dict[str, Callable[[], object]]
Make = Callable[..., Calls]
"""Builds something and returns what it can be told to do: `make(stack, device, *arguments)`."""


class Beside:
    """Calls functions in another process by name.

    Args:
        stack: ends the process.
        make: is called there; `stack` of that call ends what it builds.
        device: that the process computes on.
        arguments: of `make`, after the stack and the device.
    """

    def __init__(self, stack: ExitStack, make: Make, device: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        what = (theirs, make, device, arguments, torch.get_num_threads())
        process = context.Process(target=_serve, args=what, daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(self._pipe.send, None)

    def call(self, name: str) -> Callable[[], Any]:
        """Return a function that runs `name` (a key of what `make` returned) there, and returns its result."""

        def run() -> Any:
            self._pipe.send(name)
            return self._pipe.recv()

        return run


def _serve(pipe: Connection, make: Make, device: str, arguments: tuple[Any, ...], threads: int) -> None:
    """Run what `pipe` names to its end on `device`, until the pipe sends None."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        set_tf32(False)
    with ExitStack() as stack:
        calls = make(stack, device, *arguments)
        while name := pipe.recv():
            result = calls[name]()
            synchronise(device)
            pipe.send(result)


def make_reference(_: ExitStack, device: str, data: str, size: int) -> Calls:
    """Build the reference over the corpus in the folder `data`, with layers of `size` units."""
    (train, valid, _test), vocabulary = reference.read(data)
    job = reference.Trainer(batchify(train, 20, device), (vocabulary + 7) // 8 * 8, size)
    source = batchify(valid, 10, device)[: EVALUATION_BATCHES * job.bptt + 1]
    batches = iter(range(0, len(job.data) - 1, job.bptt))
    return {
        "step": lambda: job.step(next(batches)),
        "evaluate": lambda: job.evaluate(source),
        "gradients": lambda: job.gradients(0).item(),
        "update": job.update_and_clear,
    }
