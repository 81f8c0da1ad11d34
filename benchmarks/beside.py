"""The reference in a process of its own, which works when it is told to and waits otherwise.

The trainers set how the C library keeps memory, for their whole process. In the same process the reference would
profit from it, and no longer be what it is. The two still run in turn, call by call, on the same processors.
"""

import multiprocessing
from collections.abc import Callable
from contextlib import ExitStack
from multiprocessing.connection import Connection

import torch

from benchmarks import reference
from lm.data.corpus import batchify

EVALUATION_BATCHES = 4


class Reference:
    """Calls by name into a `reference.Trainer` elsewhere.

    Args:
        stack: ends the process.
        data: folder of the corpus.
        size: of the layers.
    """

    def __init__(self, stack: ExitStack, data: str, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, data, size, torch.get_num_threads()), daemon=True)
        process.start()
        theirs.close()
        stack.callback(process.join)
        stack.callback(self._pipe.send, None)

    def call(self, name: str) -> Callable[[], None]:
        """A function that has `name` (a key in `_serve`) run there, and returns when it has."""

        def run() -> None:
            self._pipe.send(name)
            self._pipe.recv()

        return run


def _serve(pipe: Connection, data: str, size: int, threads: int) -> None:
    torch.set_num_threads(threads)
    (train, valid, _), vocabulary = reference.read(data)
    job = reference.Trainer(batchify(train, 20, "cpu"), (vocabulary + 7) // 8 * 8, size)
    source = batchify(valid, 10, "cpu")[: EVALUATION_BATCHES * job.bptt + 1]
    batches = iter(range(0, len(job.data) - 1, job.bptt))
    calls: dict[str, Callable[[], object]] = {
        "step": lambda: job.step(next(batches)),
        "evaluate": lambda: job.evaluate(source),
        "gradients": lambda: job.gradients(0),
        "update": job.update_and_clear,
    }
    while name := pipe.recv():
        calls[name]()
        pipe.send(None)
