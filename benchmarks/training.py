"""Measurements of steps, evaluation and precision management, all in one process."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from benchmarks import reference
from benchmarks.beside import EVALUATION_BATCHES, Beside, make_reference
from benchmarks.measure import REFERENCE, Row, compared, interleaved
from benchmarks.trainers import trainer
from lm.options.modes import MODES
from lm.training.evaluation import evaluate
from lm.training.loop import Training

VOCABULARY = 33280  # of WikiText-2, rounded up to a multiple of 8
FP32, OPTIMIZER = "fp32", "fp16-optimizer"  # modes
LOOP = "loop"  # over parameters: how the names of such variants begin


class Jobs:
    """The trainers of `modes` and the reference, all over the same text, at the same size and on one device."""

    def __init__(self, stack: ExitStack, data: str, size: int, modes: list[str], device: str = "cpu") -> None:
        self.size = size
        self.device = device
        self.reference = Beside(stack, make_reference, device, data, size)
        self.trainers = {mode: stack.enter_context(trainer(mode, data, size, device)) for mode in modes}

    def steps(self) -> dict[str, Callable[[], object]]:
        """Return for each a function that trains on the next batch."""
        functions: dict[str, Callable[[], object]] = {REFERENCE: self.reference.call("step")}
        return functions | {mode: own_step(job) for mode, job in self.trainers.items()}


def own_step(job: Training) -> Callable[[], None]:
    """Return a function that trains on the next batch."""
    job.model.train()
    batches = iter(range(0, len(job.train_data) - 1, job.args.bptt))
    return lambda: job.train_step(next(batches))


def measure_step(jobs: Jobs, rounds: int) -> list[Row]:
    """Measure whole training steps, against those of the reference and against our own in fp32."""
    times = interleaved(jobs.steps(), rounds, device=jobs.device)
    return [*compared("step", jobs.size, times, faster=True), *against_fp32(jobs.size, times)]


def against_fp32(size: int, times: dict[str, list[float]]) -> list[Row]:
    """Return a row for each mode of `times` in which products are not fp32, if fp32 was measured too."""
    if FP32 not in times:
        return []
    halves = {mode: values for mode, values in times.items() if mode in MODES and MODES[mode].dtype != "float32"}
    rows = compared("half step", size, {REFERENCE: times[FP32], **halves}, faster=True)
    return [row | {"ratio_is": "our fp32 / ours"} for row in rows]


def measure_eval(jobs: Jobs, rounds: int) -> list[Row]:
    """Measure evaluation, `EVALUATION_BATCHES` batches at a time."""

    def own(job: Training) -> Callable[[], object]:
        source = job.valid_data[: EVALUATION_BATCHES * job.args.bptt + 1]
        return lambda: evaluate(job.model, job.precision, source, job.args.bptt)

    variants: dict[str, Callable[[], object]] = {REFERENCE: jobs.reference.call("evaluate")}
    variants |= {mode: own(job) for mode, job in jobs.trainers.items()}
    return compared("eval", jobs.size, interleaved(variants, rounds, device=jobs.device), faster=True)


def measure_precision(jobs: Jobs, rounds: int) -> list[Row]:
    """Measure a step without forward and backward: zero_grad, unscale, check, clip, update, copy.

    The reference clips and updates in fp32. Two more variants are the loop over parameters that one would write for
    fp16 oneself. One of them makes new fp32 gradients each time, the other keeps them.
    """

    def update(job: Training) -> Callable[[], None]:
        def run() -> None:
            job.precision.step(job.args.clip)
            job.model.zero_grad()

        return run

    variants: dict[str, Callable[[], object]] = {REFERENCE: jobs.reference.call("update")}
    prepare: dict[str, Callable[[], object]] = {REFERENCE: jobs.reference.call("gradients")}
    for mode, job in jobs.trainers.items():
        own_step(job)()
        variants[mode], prepare[mode] = update(job), restore_grads(job.model)
    for keep in (False, True):
        name = f"{LOOP}, {'kept' if keep else 'new'} gradients"
        model = reference.Model(VOCABULARY, jobs.size).to(jobs.device).half()
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        variants[name], prepare[name] = handwritten_update(model, keep), restore_grads(model)
    times = interleaved(variants, rounds, prepare=prepare, device=jobs.device)
    return [*compared("precision", jobs.size, times, faster=False), *against_loops(jobs.size, times)]


def against_loops(size: int, times: dict[str, list[float]]) -> list[Row]:
    """Return a row for each handwritten loop of `times` with FP16_Optimizer beside it, if that was measured."""
    if OPTIMIZER not in times:
        return []
    rows: list[Row] = []
    for loop in (name for name in times if name.startswith(LOOP)):
        pair = {REFERENCE: times[loop], f"FP16_Optimizer, {loop}": times[OPTIMIZER]}
        rows += [row | {"ratio_is": "ours / loop"} for row in compared("precision", size, pair, faster=False)]
    return rows


def restore_grads(model: nn.Module) -> Callable[[], None]:
    """Return a function that gives the parameters of `model` the gradients that they have now."""
    saved = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]

    def restore() -> None:
        for p, grad in saved:
            p.grad = grad.clone()

    return restore


def handwritten_update(model: nn.Module, keep_grads: bool) -> Callable[[], None]:
    """Return a loop over parameters in fp16: copy, unscale, check the sum, clip, update masters, copy back."""
    params: list[nn.Parameter] = list(model.parameters())
    masters: list[Tensor] = [p.detach().float().requires_grad_() for p in params]
    optimizer = torch.optim.SGD(masters, lr=1e-3, foreach=False)

    @torch.no_grad()
    def update() -> None:
        overflow = False
        for param, master in zip(params, masters, strict=True):
            assert param.grad is not None
            if keep_grads and master.grad is not None:
                master.grad.copy_(param.grad)
            else:
                master.grad = param.grad.float()
            master.grad.mul_(1 / 128)
            overflow |= not math.isfinite(param.grad.float().sum().item())
        if not overflow:
            nn.utils.clip_grad_norm_(masters, 0.25, foreach=False)
            optimizer.step()
            for param, master in zip(params, masters, strict=True):
                param.copy_(master)
        model.zero_grad()

    return update
