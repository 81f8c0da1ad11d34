"""The part "speed": a plain loop, with and without TF32, and five modes, all on one device and in turn."""

import itertools
import json
import os
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import reference
from benchmarks.gpu.report import Report, one_line
from benchmarks.gpu.settings import Settings
from benchmarks.measure import REFERENCE, Row, compared, interleaved, spread, synchronise
from benchmarks.trainers import trainer
from lm.data.corpus import Corpus, batchify
from lm.training.evaluation import evaluate
from lm.training.loop import EVAL_BATCH_SIZE, Training
from roundoff.device import set_tf32

MODES = ("fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
TF32 = "reference, TF32"
BATCH_SIZE, BPTT = 20, 35
ON_A_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
"""What Kineto calls the events of a GPU, in the trace that the profiler exports."""


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        sizes: of the layers.
        rounds: of each variant.
        steps: timed together, and waited for at their end.
        batches: of an evaluation.
        profiled: steps under the profiler.
    """

    sizes: tuple[int, ...]
    rounds: int
    steps: int
    batches: int
    profiled: int


GPU, CPU = Plan((200, 1500), 15, 20, 20, 3), Plan((8,), 2, 1, 1, 1)


@dataclass(frozen=True)
class Variant:
    """Holds one program that is measured beside others.

    Attributes:
        step: trains on the next batch.
        launch: the same, without a wait for the device.
        steps: trains on several batches, and does what a run does after them.
        evaluate: evaluates a few batches.
        held_bytes: GPU memory that is its own between two steps.
    """

    step: Callable[[], object]
    launch: Callable[[], object]
    steps: Callable[[], object]
    evaluate: Callable[[], object]
    held_bytes: int


def run(report: Report, settings: Settings) -> None:
    """Measure each size."""
    plan = CPU if settings.small else GPU
    corpus = Corpus(settings.data)
    for size in plan.sizes:
        with report.guarded(f"size {size}"), ExitStack() as stack:
            variants = build(stack, settings, corpus, size, plan)
            measure(report, settings, variants, size, plan)


def build(stack: ExitStack, settings: Settings, corpus: Corpus, size: int, plan: Plan) -> dict[str, Variant]:
    """Return what is measured, by name; each has trained on one batch."""
    device = settings.device
    plain = _plain(corpus, size, device, plan)
    variants = {REFERENCE: plain} | ({} if settings.small else {TF32: plain})
    for mode in MODES:
        before = _allocated(device)
        job = stack.enter_context(trainer(mode, settings.data, size, device))
        variants[mode] = _own(job, device, before, plan)
    return variants


def _plain(corpus: Corpus, size: int, device: str, plan: Plan) -> Variant:
    data = batchify(corpus.train, BATCH_SIZE, device)
    source = batchify(corpus.valid, EVAL_BATCH_SIZE, device)[: plan.batches * BPTT + 1]
    before = _allocated(device)
    job = reference.Trainer(data, corpus.vocab_size, size, min(BPTT, len(data) - 1))
    starts = itertools.cycle(range(0, len(data) - 1, job.bptt))

    def step() -> None:
        job.step(next(starts))

    def launch() -> None:
        job.model.train()
        job.gradients(next(starts))
        job.update()

    step()
    return Variant(step, launch, _repeated(step, plan.steps), lambda: job.evaluate(source), _allocated(device) - before)


def _own(job: Training, device: str, before: int, plan: Plan) -> Variant:
    starts = itertools.cycle(range(0, len(job.train_data) - 1, job.args.bptt))
    source: Tensor = job.valid_data[: plan.batches * BPTT + 1]

    def step() -> None:
        job.model.train()
        job.train_step(next(starts))

    step()
    held = _allocated(device) - before
    steps = _repeated(step, plan.steps, job.flush)
    return Variant(step, step, steps, lambda: evaluate(job.model, job.precision, source, job.args.bptt), held)


def _repeated(step: Callable[[], object], times: int, then: Callable[[], object] = lambda: None) -> Callable[[], None]:
    def steps() -> None:
        for _ in range(times):
            step()
        then()

    return steps


def measure(report: Report, settings: Settings, variants: Mapping[str, Variant], size: int, plan: Plan) -> None:
    """Report all figures of one size."""
    device = settings.device
    prepare: dict[str, Callable[[], object]] = {name: _tf32(name, device) for name in variants}
    calls = {name: variant.steps for name, variant in variants.items()}
    times = interleaved(calls, plan.rounds, prepare=prepare, device=device)
    each = {name: [seconds / plan.steps for seconds in values] for name, values in times.items()}
    rows = compared("step", size, each, faster=True)
    evaluations = interleaved({n: v.evaluate for n, v in variants.items()}, plan.rounds, prepare=prepare, device=device)
    for name, variant in variants.items():
        prepare[name]()
        figures: dict[str, Any] = {
            "part": "speed",
            "size": size,
            "name": name,
            "step_ms": spread([1e3 * seconds for seconds in each[name]]),
            "launch_ms": launch_ms(variant, device, plan.steps),
            "evaluation_ms_a_batch": spread([1e3 * seconds / plan.batches for seconds in evaluations[name]]),
            "peak_bytes": peak_bytes(variant, device),
            **kernels(variant, settings, plan.profiled),
        }
        report.figure(shown(figures), **figures)
    for row in rows:
        report_ratio(report, row, settings)


def _tf32(name: str, device: str) -> Callable[[], None]:
    """Return what sets TF32 before the variant `name`."""
    return lambda: set_tf32(name == TF32) if device != "cpu" else None


def launch_ms(variant: Variant, device: str, times: int) -> float:
    """Return the milliseconds that Python takes to give the device one step; the median of several."""
    taken = []
    for _ in range(times):
        synchronise(device)
        start = time.perf_counter()
        variant.launch()
        taken.append(time.perf_counter() - start)
    return 1e3 * statistics.median(taken)


def peak_bytes(variant: Variant, device: str) -> int | None:
    """Return the most GPU memory that a process with this variant alone would hold; None on a CPU."""
    if device == "cpu":
        return None
    variant.step()  # an evaluation has taken its gradients
    synchronise(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    variant.step()
    synchronise(device)
    return variant.held_bytes + torch.cuda.max_memory_allocated(device) - before


def kernels(variant: Variant, settings: Settings, steps: int) -> dict[str, Any]:
    """Return how many kernels a step has, their milliseconds together, and which take the most.

    On a CPU operations stand in for kernels; those within others count twice.
    """
    activities = [ProfilerActivity.CPU] if settings.small else [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    trace = Path(settings.scratch, "trace.json")
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it prints a line at each start and stop
    try:
        with profile(activities=activities) as profiler:
            for _ in range(steps):
                variant.launch()
            synchronise(settings.device)
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    except (RuntimeError, ValueError, KeyError, OSError) as error:  # a machine may not let anybody profile
        return {"kernels": None, "kernel_ms": None, "top": [], "not_profiled": one_line(error)}
    return count(events, steps, ("cpu_op",) if settings.small else ON_A_GPU)


def count(events: list[dict[str, Any]], steps: int, categories: tuple[str, ...], most: int = 5) -> dict[str, Any]:
    """Return what `kernels` does, of the events of a trace."""
    taken: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in events:
        if event.get("cat") in categories:
            taken[event["name"]] += event.get("dur", 0.0)
            times[event["name"]] += 1
    if not times:
        return {"kernels": None, "kernel_ms": None, "top": [], "not_profiled": "the profiler saw none"}
    top = [
        {"name": name[:120], "ms_a_step": micros / 1e3 / steps, "a_step": times[name] / steps}
        for name, micros in taken.most_common(most)
    ]
    return {"kernels": times.total() / steps, "kernel_ms": taken.total() / 1e3 / steps, "top": top}


def shown(figures: Mapping[str, Any]) -> str:
    """Return the figures of one variant as a line."""
    peak = figures["peak_bytes"]
    memory = "" if peak is None else f", {peak / 2**20:,.0f} MiB"
    found = figures["kernels"]
    what = "operations" if peak is None else "kernels"
    profiled = figures.get("not_profiled") if found is None else f"{found:.0f} {what} of {figures['kernel_ms']:.2f} ms"
    return (
        f"{figures['size']:4} {figures['name']:22} step {figures['step_ms']['median']:7.2f} ms, launched in "
        f"{figures['launch_ms']:6.2f}, {profiled}, evaluation {figures['evaluation_ms_a_batch']['median']:6.2f} ms a "
        f"batch{memory}"
    )


def report_ratio(report: Report, row: Row, settings: Settings) -> None:
    """Report how many times as fast as the plain loop in fp32 a variant is."""
    ratio, name = row["ratio"], f"step at {row['size']} units, plain loop in fp32 / {row['name']}"
    found = f"{ratio['median']:.2f} ({ratio['q1']:.2f} to {ratio['q3']:.2f})"
    if settings.small:  # nobody trains at this size
        report.figure(f"{name}: {found}", **row)
    else:
        means = ("", "it is slower than a plain loop")
        report.check(name, found, "above 1", as_expected=ratio["median"] > 1, means=means)


def _allocated(device: str) -> int:
    return 0 if device == "cpu" else torch.cuda.memory_allocated(device)
