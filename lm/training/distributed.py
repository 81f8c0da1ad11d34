"""Distributed training: one run in several processes, started by torchrun.

In a single process each function does nothing, or returns what it is given.
"""

import ctypes
import os
import socket
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from roundoff.errors import RunError
from roundoff.processes import rank, world_size

TIMEOUT = timedelta(minutes=5)
"""How long a process waits for the others. Writing a checkpoint to a slow disk must fit into it."""
ROLL_CALL = 3.0  # seconds that the others have to say that they are alive
BUCKET_MB = 64  # of gradients that a message between GPUs carries; torch's choice is 1 first, then 25
HALF = (torch.float16, torch.bfloat16)
STOP_INTERVAL = {"cuda": 10}
"""How many steps share a message about signals, by device; elsewhere each step sends one.

By estimate the message takes up to 0.2 ms, and a step some 2 ms on a GPU. On a CPU a step takes 100 ms and more.
"""
STORE_TIMEOUT = timedelta(seconds=3)  # for torchrun's store, which is there before any process

_store: Any = None


def init_process_group(device: str) -> None:
    """Meet the other processes, once. On GPUs they talk through nccl, on CPUs through gloo.

    Raises:
        RunError: they did not all come.
    """
    global _store
    if world_size() == 1 or dist.is_initialized():
        return
    backend = "gloo"
    if device.startswith("cuda"):
        torch.cuda.set_device(device)
        backend = "cpu:gloo,cuda:nccl"
    try:
        _store, number, size = next(rendezvous("env://", timeout=TIMEOUT))
        group = dist.PrefixStore("group", _store)  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=group, rank=number, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RunError(f"cannot reach the other processes ({first_line(error)}); see torchrun's options") from None
    # Never to be deleted: the group's destructor waits, with Python's lock in hand, for the threads that carry its
    # messages, and one of these may be waiting for that lock, or for a process that hangs.
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def own_random_numbers(seed: int) -> None:
    """Let each process draw dropout masks of its own, now that all have drawn the same weights."""
    if rank() > 0:
        torch.manual_seed(seed + rank())


def barrier() -> None:
    """Wait for the others: torchrun ends all processes as soon as one has ended badly.

    One that has failed on its way here says so itself.
    """
    if world_size() > 1:
        with suppress(RuntimeError):
            dist.barrier()


def meet_before_a_wait(device: str) -> None:
    """Wait for the others before a wait for a GPU, in whose queue there may be a message from one that is lost.

    This wait ends if a process has gone, and that one may not.

    Raises:
        RuntimeError: a process has gone; see `lost`.
    """
    if world_size() > 1 and device.startswith("cuda"):
        dist.barrier()  # of gloo, since no process group was given a GPU of its own


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Let rank 0 run the block alone, then the others."""
    if rank() > 0:
        barrier()
    yield
    if rank() == 0:
        barrier()


def destroy_process_group() -> None:
    """Leave the process group. With nccl this waits for all messages under way, for ever if a process is lost."""
    if dist.is_initialized():
        dist.destroy_process_group()


def data_parallel(model: nn.Module) -> nn.Module:
    """Return `model` so that backward gives it the mean gradients of all processes, in the dtype of its weights.

    An inf or nan in one process's gradient is then one in every process's: all skip the same steps. torch averages
    the gradients of fp32 weights, and `average_in_fp32` those of half weights.

    Gradients are views of the memory in which they travel, so they may be changed in place, but not detached. On
    GPUs messages are larger than torch's own choice, and fewer. On a CPU they are not: with more than two processes
    their size decides the order of sums, and so the bits. `static_graph` is not set. With it torch would order its
    sums by the second backward pass, and the first step of a resumed run would differ. It would gain nothing here,
    because every parameter is used in every step.
    """
    if world_size() == 1:
        return model
    size = BUCKET_MB if next(model.parameters()).is_cuda else None
    parallel = DistributedDataParallel(model, gradient_as_bucket_view=True, bucket_cap_mb=size)
    if any(parameter.dtype in HALF for parameter in model.parameters()):
        parallel.register_comm_hook(None, average_in_fp32)
    return parallel


def no_sync(parallel_model: nn.Module) -> AbstractContextManager[object]:
    """Return the context of a forward pass whose gradients stay here: the next backward pass outside averages the sum.

    `parallel_model` is what `data_parallel` returned.
    """
    return parallel_model.no_sync() if isinstance(parallel_model, DistributedDataParallel) else nullcontext()


def average_in_fp32(_: None, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:  # type: ignore[name-defined]
    """Replace the gradients in `bucket` by their mean over all processes: summed in fp32, rounded to their dtype once.

    DistributedDataParallel itself divides half gradients in half before it sums them, and sums them in half. Of a
    gradient near the smallest subnormal number nothing is left then: with 4 processes two more binades are lost at
    the same loss scale. Finite fp16 gradients cannot overflow in an fp32 sum. Twice as many bytes travel.
    """
    half: Tensor = bucket.buffer()
    work = dist.all_reduce(half.float(), async_op=True)
    if not half.is_cuda:
        work.wait()  # else gloo's thread would run what follows, and ask for Python's lock, even while Python ends

    def finish(done: torch.futures.Future[list[Tensor]]) -> Tensor:
        sums = done.value()[0]
        count = torch.full((), world_size(), dtype=sums.dtype, device=sums.device)
        return half.copy_(sums.div_(count))  # by a tensor: CUDA multiplies by the rounded reciprocal of a plain number

    averaged: torch.futures.Future[Tensor] = work.get_future().then(finish)
    return averaged


def shard(data: Tensor) -> Tensor:
    """Return this process's share of the columns of `data`, shape (rows, columns / world_size)."""
    if world_size() == 1:
        return data
    return data.chunk(world_size(), dim=1)[rank()].contiguous()


def mean(values: Tensor) -> Tensor:
    """Return the mean of each of `values` (fp32) over all processes.

    The sum is in float64, where it does not depend on the order of its terms. With more than two processes, that
    order depends on a value's place among the others.
    """
    if world_size() == 1:
        return values
    sums = values.double()
    dist.all_reduce(sums)
    return (sums / world_size()).float()


def broadcast(value: float) -> float:
    """Return rank 0's `value`: a decision that depends on it must be the same everywhere."""
    if world_size() == 1:
        return value
    tensor = torch.tensor(value, dtype=torch.float64)
    dist.broadcast(tensor, 0)
    return float(tensor)


def gather(value: Any) -> list[Any]:
    """Return the `value` of each process in the order of ranks; on other ranks than 0, an empty list."""
    if world_size() == 1:
        return [value]
    values = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, values)
    return values or []


class Maximum:
    """Finds the largest value that any process has given, and tells all of them at the same step.

    The answer is one message old. So no process waits for a message under way, and none for a GPU.

    Args:
        every: a message is sent at each `every`-th call. All processes must give the same number, and call equally
            often.
    """

    def __init__(self, every: int = 1) -> None:
        self._every = every
        self._calls = 0
        self._known = 0
        self._under_way: tuple[Any, Tensor] | None = None

    def __call__(self, mine: int) -> int:
        """Give `mine`; return what all had given by the message before. In a single process that is `mine` itself."""
        if world_size() == 1:
            return mine
        self._calls += 1
        if self._calls % self._every:
            return self._known
        if self._under_way:
            self._under_way[0].wait()
            self._known = int(self._under_way[1])
        answer = torch.tensor(max(mine, self._known))
        self._under_way = dist.all_reduce(answer, dist.ReduceOp.MAX, async_op=True), answer
        return self._known


def once(text: str, say: Callable[[], object]) -> None:
    """Call `say`, which says `text`, in the first process that asks for it; in the others, return after that.

    This works before `init_process_group` too, and where other processes have gone.
    """
    if world_size() == 1:
        say()
        return
    try:
        store = _store or next(rendezvous("env://", timeout=STORE_TIMEOUT))[0]
        if store.add(f"claimed/{text}", 1) > 1:
            store.wait([f"said/{text}"], STORE_TIMEOUT)
            return
    except (RuntimeError, ValueError):  # better twice than never
        store = None
    say()
    if store is not None:
        with suppress(RuntimeError):
            store.set(f"said/{text}", "")


def lost(error: RuntimeError) -> RunError | None:
    """Return an error that names the process that has gone or hangs, if `error` came of one; else None."""
    if world_size() == 1 or not _is_of_communication(error):
        return None
    _hang_up()
    missing = ", ".join(map(str, _roll_call()))
    who = f"no answer from rank {missing}" if missing else "the connection broke, though all ranks are alive"
    return RunError(
        f"cannot go on: {who} (see its own messages, and the exit code that torchrun gives); "
        "start again with --resume and the run directory"
    )


def _is_of_communication(error: RuntimeError) -> bool:
    return isinstance(error, dist.DistError) or "gloo" in str(error) or "Application timeout" in str(error)


def _hang_up() -> None:
    """Break the connections to the other processes, but not the one to the store.

    A process fails at once only if the one that it waits for has gone. Those that wait for this one must not find
    out when it ends, or the roll call would miss them.
    """
    store = int(os.environ["MASTER_PORT"])
    descriptors = Path("/dev/fd")  # Windows has none
    for descriptor in [int(path.name) for path in descriptors.iterdir()] if descriptors.exists() else []:
        with suppress(OSError):  # no longer open, or not connected
            if descriptor > 2 and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                with socket.socket(fileno=os.dup(descriptor)) as connection:
                    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
                    if internet and store not in (connection.getpeername()[1], connection.getsockname()[1]):
                        connection.shutdown(socket.SHUT_RDWR)


def _roll_call() -> list[int]:
    """Return the ranks that do not answer, by way of the store. torchrun keeps the store, whoever has died."""
    if _store is None:
        return []
    missing = [n for n in range(world_size()) if n != rank()]
    deadline = time.monotonic() + ROLL_CALL
    try:
        _store.set(f"alive/{rank()}", "")
        while missing and time.monotonic() < deadline:
            missing = [n for n in missing if not _store.check([f"alive/{n}"])]
            time.sleep(0.05)
    except RuntimeError:
        return []
    return missing


def first_line(error: Exception) -> str:
    """Return the first line of `error`, in short."""
    return (str(error).splitlines() or [type(error).__name__])[0][:120]
