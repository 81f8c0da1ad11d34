"""The reference in a process of its own, which works when it is told to and waits otherwise.

The trainers set how the C library keeps memory, for their whole process. The reference would be faster in such a
process, and so no reference. The two still run in turn, call by call, on the same processors.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import torch

from benchmarks import reference
from benchmarks.measure import synchronise
from lm.data.corpus import batchify
from roundoff.device import set_tf32

EVALUATION_BATCHES = 4


class Reference:
    """Calls the functions of a `reference.Trainer` in another process by name.

    Args:
        stack: ends the process.
        data: folder of the corpus.
        size: of the layers.
        device: that it trains on.
    """

    def __init__(self, stack: ExitStack, data: str, size: int, device: str = "cpu") -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(
            target=_serve, args=(theirs, data, size, device, torch.get_num_threads()), daemon=True
        )
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(self._pipe.send, None)

    def call(self, name: str) -> Callable[[], None]:
        """Return a function that runs `name` (a key in `_serve`) there, and waits for its end."""

        def run() -> None:
            self._pipe.send(name)
            self._pipe.recv()

        return run


def _serve(pipe: Connection, data: str, size: int, device: str, threads: int) -> None:
    """Run what `pipe` names to its end on `device`, until the pipe sends None."""
    torch.set_num_threads(threads)
    if device.startswith("cuda"):
        set_tf32(False)
    (train, valid, _), vocabulary = reference.read(data)
    job = reference.Trainer(batchify(train, 20, device), (vocabulary + 7) // 8 * 8, size)
    source = batchify(valid, 10, device)[: EVALUATION_BATCHES * job.bptt + 1]
    batches = iter(range(0, len(job.data) - 1, job.bptt))
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: job.step(next(batches)),
        "evaluate": lambda: job.evaluate(source),
        "gradients": lambda: job.gradients(0),
        "update": job.update_and_clear,
    }
    while name := pipe.recv():
        calls[name]()
        synchronise(device)
        pipe.send(None)
