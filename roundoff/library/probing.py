"""`probe`: what precision modes do to the gradient of any model."""

import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from roundoff.device import get_random_states, peak_memory_bytes, random_state_kept, set_random_states
from roundoff.errors import CheckError, UsageError, printable
from roundoff.extras import require_report
from roundoff.gradients import advice
from roundoff.gradients.measure import Measurement, Plan, ScaledGradients
from roundoff.gradients.module import Loss, ModuleMode, ModuleReference, Task, check_task
from roundoff.gradients.result import FORMAT, write_probe
from roundoff.modes import Build, named, stock
from roundoff.runs.config_file import describe_device, versions
from roundoff.runs.json_text import to_json
from roundoff.terminal import progress_bar, say

COVERS = [
    "Errors are of one backward pass at one set of weights, with the rounding of the weights in them. Errors that add "
    "up over steps, and what an optimizer makes of them, are not seen.",
    "A tensor of which an element is inf or nan in a mode has no error and no bias there.",
    "Shares are of the elements that are not 0 in the reference (nor under 2**-40 of the tensor's largest). Predicted "
    "ones are of the reference's own values, rounded to fp16 once; a mode's own have in them what was flushed further "
    "up on the way back.",
    "Noise, bias and their standard errors come from inner products of sketches, true to about 1%, and from as many "
    "batches as are named here; other batches may differ.",
]
SUSPICIOUS = 1e-3
"""An error of fp32's gradient, as a share of its length, that rounding does not explain; 1e-6 is usual."""

PROBED = ("fp32", "amp-fp16", "amp-bf16")


class ProbeReport:
    """Holds the figures of a probe, shows them, and holds them to bounds.

    Attributes:
        result: all of probe.json, as `roundoff.gradients.result` describes it.
    """

    def __init__(self, result: dict[str, Any]) -> None:
        self.result = result

    def __str__(self) -> str:
        """Return the table, the advice, and what the figures do not cover; at most 100 columns wide."""
        from roundoff.report.probe_table import table

        return table(self.result)

    def save(self, folder: str | Path) -> None:
        """Write probe.json, probe.html and probe.png into `folder`, which is made.

        Raises:
            UsageError: a package of the extra `report` is not installed; probe.json is there then.
            OSError: a file cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_probe(folder / "probe.json", self.result)
        require_report()
        from roundoff.report.probe_html import write_html
        from roundoff.report.probe_png import write_png

        write_html(folder / "probe.html", self.result)
        write_png(folder / "probe.png", self.result)

    def check(
        self, *, error_to_noise: float | None = None, bias: float | None = None, forward: float | None = None
    ) -> None:
        """Check that no mode exceeds the bounds that are given; so a CI can hold a model to a precision.

        Args:
            error_to_noise: bound of each parameter's and of all parameters' error to noise.
            bias: likewise, of the bias as a share of the mean gradient.
            forward: bound of the largest difference of any output, in the output's own unit.

        Raises:
            CheckError: a figure is above its bound, or there is none: a mode could not run, something overflowed, or
                all batches have the same gradient. It names the mode, the tensor and the figure that exceeds its bound
                most.
            UsageError: a bound is no number from 0 on.
        """
        bounds = {"error_to_noise": error_to_noise, "bias": bias}
        for name, bound in (bounds | {"forward": forward}).items():
            if bound is not None and (not isinstance(bound, int | float) or not 0 <= bound < math.inf):
                raise UsageError(f"{name} is {bound!r}; give a number from 0 on as its bound")
        for reason in self.result["left_out"].values():
            raise CheckError(f"{reason}, so nothing holds it to a bound; leave it out of the modes")
        found = [x for name, bound in bounds.items() if bound is not None for x in self._excesses(name, bound)]
        if forward is not None:
            found += self._forward_excesses(forward)
        if found:
            _, worst = max(found)
            others = f"; so are {len(found) - 1} more figures above theirs" if len(found) > 1 else ""
            raise CheckError(f"{worst}{others}")

    def _excesses(self, figure: str, bound: float) -> list[tuple[float, str]]:
        words, found = figure.replace("_", " "), []
        parameters = {tensor["name"] for tensor in self.result["tensors"] if tensor["kind"] == "parameter"}
        for mode, of_mode in self.result["modes"].items():
            tensors = {name: values for name, values in of_mode["tensors"].items() if name in parameters}
            for tensor, values in {"all parameters": of_mode["total"], **tensors}.items():
                where = f"{printable(mode)}, {printable(tensor)}"
                if values["overflowed"]:
                    share = values["overflowed"]
                    found.append((math.inf, f"{where}: {share:.2g} of the gradient overflowed, and has no {words}"))
                elif values[figure] is None:
                    why = (
                        "its gradient is the same in all batches"
                        if figure == "error_to_noise"
                        else "it has no gradient"
                    )
                    found.append((math.inf, f"{where}: there is no {words}, since {why}"))
                elif values[figure] > bound:
                    said = f"{where}: {words} is {values[figure]:.3g}, above its bound {bound:g}"
                    found.append((values[figure] / bound if bound else math.inf, said))
        return found

    def _forward_excesses(self, bound: float) -> list[tuple[float, str]]:
        found = []
        for mode, of_mode in self.result["modes"].items():
            for output, figures in of_mode["forward"].items():
                largest = math.inf if figures["largest"] is None else figures["largest"]
                if largest > bound:
                    said = f"{printable(mode)}, {printable(output)}: largest difference is {largest:.3g}"
                    found.append((largest / bound if bound else math.inf, f"{said}, above its bound {bound:g}"))
        return found


def probe(
    model: nn.Module,
    loss: Loss,
    batches: Iterable[Any],
    modes: Sequence[str | Build] | Mapping[str, str | Build] = PROBED,
    *,
    state: Any = None,
    watch: Sequence[str] = (),
    reference: torch.dtype = torch.float64,
    seed: int = 0,
    lr: float | None = None,
    clip: float = math.inf,
    flush_limit: float = 1e-3,
    job: Mapping[str, Any] | None = None,
) -> ProbeReport:
    """Measure what each mode does to the gradient of `loss`, and take no step.

    Each mode's gradient is compared with that of the same model and loss in float64, for the same batches and dropout
    masks. Parameters, buffers, gradients, random state and training flags of `model` are the same before and after.

        def loss(model, batch):
            images, labels = batch
            return F.cross_entropy(model(images).float(), labels)

        report = probe(model, loss, batches, ["fp32", "masters-fp16", "amp-bf16"])
        print(report)

    Args:
        model: on the CPU or a GPU, in fp32, and in training mode where it is to train so.
        loss: `loss(model, batch)` returns a scalar tensor, or a dict of tensors with the scalar "loss", whose other
            entries are compared as outputs of the forward pass. With `state` it is `loss(model, batch, state)`, and
            returns a pair: that, and the state for the next batch.
        batches: at least 3, on the model's device; use `itertools.islice(loader, 32)` for some of many. Their floating
            tensors are copied and cast to the dtype that the weights have in each mode, targets too, within tuples,
            lists, mappings and dataclasses.
        modes: names of stock modes (`roundoff.modes`), or a dict of name -> `Build`.
        state: of the loss before the first batch, such as a recurrent layer's; floating tensors in tuples.
        watch: names of submodules of whose outputs the gradients are counted, too.
        reference: torch.float32 for a model that has no float64 kernels. Casts in model and loss to narrower dtypes
            have no effect in the reference, so `.float()` before a loss may stay.
        seed: of dropout and all else that is drawn.
        lr: learning rate of a plain SGD step, to count the updates that half weights without masters would lose.
        clip: norm to which that step clips the gradient.
        flush_limit: the share of a gradient that a loss scale that serves may flush.
        job: what is probed, for the records; any mapping.

    Raises:
        UsageError: the model or the loss cannot be probed, a mode is unknown, none can run here, or there are fewer
            than 3 batches.
    """
    start = time.monotonic()
    _check(watch, reference, seed, lr, clip, flush_limit, job)
    task = Task(model, loss, tuple(watch), stateful=state is not None)
    check_task(task)
    builds = named(modes)
    device = str(next(model.parameters()).device)
    with random_state_kept(device), _gradients_kept(model):
        contents = list(batches)
        plan = Plan([], len(contents), seed, lr=lr, clip=clip, device=device)
        say(_announcement(task, builds, len(contents), reference))
        made, left_out, caution = _try_once(builds, task, ModuleReference(task, reference, state), contents, device)
        truth = ModuleReference(task, reference, state)
        measured = Measurement(truth, replace(plan, modes=made))
        measured.run(truth.batches(progress_bar(contents, "probe")))
    unused = [name for name in task.parameters() if name not in truth.reached]
    result = _describe(model, len(contents), device, job) | {
        "seed": seed,
        "lr": lr,
        "clip": clip if math.isfinite(clip) else None,
        "flush_limit": flush_limit,
        "left_out": left_out,
    }
    result |= measured.figures(unused)
    result |= advice.conclude(result) | {"covers": [*_covers(task, unused, left_out, reference), *COVERS]}
    result["advice"] = [*caution, *result["advice"]]
    return ProbeReport(result | {"seconds": time.monotonic() - start, "peak_memory_bytes": peak_memory_bytes(device)})


def _check(
    watch: Any, reference: Any, seed: Any, lr: Any, clip: Any, flush_limit: Any, job: Mapping[str, Any] | None
) -> None:
    """Raise UsageError for what would fail in the end, after minutes, if nobody looked."""
    if isinstance(watch, str):
        raise UsageError(f"watch is {watch!r}; give a list of names of submodules")
    if reference not in (torch.float64, torch.float32):
        raise UsageError(f"reference={reference}: allowed are torch.float64 and torch.float32")
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise UsageError(f"seed is {seed!r}; give a whole number from 0 on")
    for name, value in {"lr": lr or 0.0, "clip": clip, "flush_limit": flush_limit}.items():
        if not isinstance(value, int | float) or not value >= 0:
            raise UsageError(f"{name} is {value!r}; give a number from 0 on")
    try:
        to_json(dict(job or {}))
    except (TypeError, ValueError) as error:
        raise UsageError(f"job cannot be written as JSON ({error}); give texts, numbers, lists and dicts") from None


@contextmanager
def _gradients_kept(model: nn.Module) -> Iterator[None]:
    """Put the model's gradients back after the block: a loss may use the model itself, and not the copy."""
    before = [(p, p.grad) for p in model.parameters()]
    for p, _ in before:
        p.grad = None
    try:
        yield
    finally:
        for p, grad in before:
            p.grad = grad


def _try_once(
    builds: Mapping[str, Build], task: Task, truth: ModuleReference, contents: Sequence[Any], device: str
) -> tuple[list[ModuleMode], dict[str, str], list[str]]:
    """Run the first batch in the reference, in fp32 and in each mode.

    Returns:
        The modes that can run here, name -> reason for each that cannot, and a sentence if fp32 is suspicious.

    Raises:
        UsageError: the loss cannot be computed or does not use the model, or no mode can run.
    """
    first = next(truth.batches(contents))
    before = get_random_states(device)
    truth.run(first, lambda name, part: None)  # what is wrong with the loss is no mode's fault
    if not truth.reached:
        raise UsageError("no gradient reaches the model that the loss is given; let loss(model, batch) use that one")
    set_random_states(before, device)
    caution = _caution(truth, ModuleMode("fp32", stock("fp32"), task).gradients(first))
    made, left_out = [], {}
    for name, build in builds.items():
        try:
            mode = ModuleMode(name, build, task)
            mode.gradients(first)
            made.append(mode)
        except UsageError as error:
            left_out[name] = str(error)
            say(f"| probe: {error}; it is left out")
    if not made:
        raise UsageError(next(iter(left_out.values())))
    return made, left_out, caution


def _caution(truth: ModuleReference, found: ScaledGradients) -> list[str]:
    """Say where fp32 is so far from the reference that something else must differ than the precision."""
    pairs = [(exact, found.parameters[name]) for name, (exact, _) in truth.gradients().items()]
    error = math.hypot(*(float((gradient.double() - exact).norm()) for exact, gradient in pairs))
    size = math.hypot(*(float(exact.norm()) for exact, _ in pairs))
    if error < SUSPICIOUS * size:
        return []
    return [
        f"Beware: the gradient of fp32 itself is {error / size:.2g} of its length away from the reference. Something "
        "in the model or the loss differs from pass to pass: random numbers that are not torch's, or that torch draws "
        "otherwise in each dtype, or an autocast of its own."
    ]


def _describe(model: nn.Module, batches: int, device: str, job: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the fields of the result that say what was probed, and on what."""
    parameters = sum(p.numel() for p in model.parameters())
    return {
        "format": FORMAT,
        "environment": versions() | describe_device(device) | {"command": sys.argv},
        "about": f"{type(model).__name__} of {parameters:,} parameters; {batches} batches.",
        "job": {"model": type(model).__name__, "parameters": parameters, **(job or {})},
        "batches": batches,
    }


def _announcement(task: Task, builds: Mapping[str, Build], batches: int, reference: torch.dtype) -> str:
    """Return the line on the memory that will be taken, beside activations: reference, one mode's copy, sketches."""
    numbers = sum(p.numel() for p in task.parameters().values())
    sketches = sum(min(p.numel() * batches, 1 << 17) for p in task.parameters().values()) * (1 + 2 * len(builds))
    bytes_needed = numbers * (2 * reference.itemsize + 4 + 4 + 1) + 4 * sketches
    short = str(reference).removeprefix("torch.")
    modes = f"{len(builds)} mode{'s' if len(builds) > 1 else ''}"
    mib = max(1, math.ceil(bytes_needed / 2**20))
    return (
        f"| probe: {numbers:,} parameters, {batches} batches, {modes}; takes up to {mib:,} MiB beside activations: "
        f"{short} weights and gradients, one mode's, sketches"
    )


def _covers(task: Task, unused: Sequence[str], left_out: Mapping[str, str], reference: torch.dtype) -> list[str]:
    short = str(reference).removeprefix("torch.")
    said = [f"{reason}; it is left out." for reason in left_out.values()]
    said += [f"The true gradient is that of the same model, loss and batch in {short}, at the fp32 weights."]
    if reference is torch.float32:
        said.append("A reference in float32 has errors of its own: the error of mode fp32 is not seen.")
    if not task.model.training:
        said.append("The model was in evaluation mode: no dropout, and BatchNorm with its running statistics.")
    if unused:
        more = f" and {len(unused) - 5} more" if len(unused) > 5 else ""
        said.append(f"No gradient but rounding reached {', '.join(unused[:5])}{more}; they are left out.")
    return said
