"""Runs the reference and the modes over the same batches and makes the figures of probe.json. Takes no step."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lm.data.corpus import get_batch
from lm.launch.probing.boundaries import LOGITS, tensor_names
from lm.launch.probing.mode import MEASURED_KS, Mode, script_of
from lm.launch.probing.mode import Gradients as ModeGradients
from lm.launch.probing.reference import Reference
from lm.model.language_model import Hidden, RNNModel
from roundoff.device import release_freed_memory
from roundoff.errors import UsageError
from roundoff.gradients import statistics
from roundoff.gradients.exponents import KS, Exponents, predict
from roundoff.gradients.result import VALUES
from roundoff.gradients.statistics import LEAST_BATCHES, Estimate, Sketch
from roundoff.gradients.tally import Gradients, Shares, Stagnation, Tally
from roundoff.terminal import progress_bar

SEED_OF_SIGNS = 0


@dataclass(frozen=True)
class Plan:
    """What is measured.

    Attributes:
        modes: to be compared with the reference.
        scaled: in which fp16's loss scales are measured: exponent -> mode, which may be one of `modes`.
        batches: how many.
        bptt: words of a batch, in each column.
        seed: of the dropout.
        lr, clip: of an SGD update.
    """

    modes: list[Mode]
    scaled: dict[int, Mode]
    batches: int
    bptt: int
    seed: int
    lr: float | None
    clip: float


def plan_scales(modes: Sequence[Mode], options: Mapping[str, Any]) -> dict[int, Mode]:
    """A mode of half weights for each of `MEASURED_KS`: of `modes` where one has that loss scale."""
    half = {mode.scale: mode for mode in modes if getattr(mode.args, "fp16", False) and mode.args.script != "main_amp"}
    return {k: half.get(2.0**k) or Mode("manual", {**options, "static_loss_scale": 2.0**k}) for k in MEASURED_KS}


class Probe:
    """All that is counted of a model, batch by batch.

    Args:
        model: fp32, on the CPU; it stays as it is.
        plan: what to measure.

    Raises:
        UsageError: this machine cannot run one of the modes.
    """

    def __init__(self, model: RNNModel, plan: Plan) -> None:
        self.model, self.plan = model, plan
        self.dtypes = {mode.name: mode.dtypes(model) for mode in plan.modes}
        self.names = tensor_names(model)
        self.numel = {name: p.numel() for name, p in model.named_parameters()}
        self.reference = Reference(model)
        generator = torch.Generator().manual_seed(SEED_OF_SIGNS)
        n = plan.batches
        sketches = {name: Sketch(p.shape, n, generator) for name, p in model.named_parameters()}
        self.gradients = {name: Gradients(sketch, n) for name, sketch in sketches.items()}
        self.exponents = {name: Exponents() for name in self.names}
        self.tallies: dict[str, dict[str, Shares]] = {
            mode.name: {
                name: Tally(mode.dtype, sketches[name], n) if name in sketches else Shares(mode.dtype)
                for name in self.names
            }
            for mode in plan.modes
        }
        self.extra = {k: mode for k, mode in plan.scaled.items() if mode not in plan.modes}
        self.scaled = {k: {name: Shares(mode.dtype) for name in self.names} for k, mode in self.extra.items()}
        dtypes = {mode.dtype for mode in plan.modes}
        self.stagnation = {dtype: {name: Stagnation(dtype) for name in sketches} for dtype in dtypes}

    def run(self, data: Tensor) -> None:
        """Measure the first batches of `data`, of shape (rows, batch_size), the hidden state carried along.

        Leaves torch's random state as it was.

        Raises:
            UsageError: it has fewer batches than asked for, or those are too few.
        """
        starts = range(0, len(data) - 1, self.plan.bptt)
        if not LEAST_BATCHES <= self.plan.batches <= len(starts):
            raise UsageError(
                f"--batches {self.plan.batches}: from {LEAST_BATCHES} (for a deviation and its error) to {len(starts)} "
                f"(all that the corpus has) can be measured"
            )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.plan.seed)
            hidden = self.reference.init_hidden(data.size(1))
            for batch in progress_bar(range(self.plan.batches), "probe"):
                hidden = self._measure(batch, *get_batch(data, starts[batch], self.plan.bptt), hidden)

    def _measure(self, batch: int, tokens: Tensor, targets: Tensor, hidden: Hidden) -> Hidden:
        release_freed_memory()
        before = torch.get_rng_state()
        after_batch = self.reference.run(tokens, targets, hidden, self.exponents[LOGITS].add)
        after = torch.get_rng_state()
        parameters, boundaries = self.reference.gradients(), self.reference.boundaries
        for name, (gradient, rows) in parameters.items():
            self.gradients[name].add(batch, gradient, rows)
            self.exponents[name].add(gradient)
        for name, gradient in boundaries.items():
            self.exponents[name].add(gradient)
        self.numel |= {name: gradient.numel() for name, gradient in boundaries.items()}
        self.numel[LOGITS] = targets.numel() * self.model.options["ntokens"]
        self._stagnation(parameters)
        expected = Expected(parameters, {name: gradient != 0 for name, gradient in boundaries.items()})
        for mode in self.plan.modes:
            release_freed_memory()  # each mode takes blocks of other sizes, which leave holes
            torch.set_rng_state(before)
            _compare(
                batch, mode, mode.gradients(self.model, tokens, targets, hidden), expected, self.tallies[mode.name]
            )
        for k, mode in self.extra.items():
            release_freed_memory()
            torch.set_rng_state(before)
            _count(mode.gradients(self.model, tokens, targets, hidden), expected, self.scaled[k])
        torch.set_rng_state(after)
        return after_batch

    def _stagnation(self, parameters: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        if self.plan.lr is None:
            return
        norm = math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient, _ in parameters.values()))
        step = self.plan.lr * min(1.0, self.plan.clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        weights = dict(self.model.named_parameters())
        for tallies in self.stagnation.values():
            for name, (gradient, rows) in parameters.items():
                tallies[name].add(_select(weights[name].detach(), rows), gradient, step)

    def figures(self) -> dict[str, Any]:
        """`tensors`, `total`, `modes` and `scales` of probe.json."""
        products = {name: gradients.products() for name, gradients in self.gradients.items()}
        total = torch.stack(list(products.values())).sum(0)
        return {
            "tensors": [
                {"name": name, "kind": kind, "numel": self.numel[name]} | _spread(products.get(name))
                for name, kind in self.names.items()
            ],
            "total": _spread(total),
            "modes": {mode.name: self._mode(mode, products, total) for mode in self.plan.modes},
            "scales": {
                "k": list(KS),
                "predicted": {name: predict(exponents) for name, exponents in self.exponents.items()},
                "measured": [self._scale(k, mode) for k, mode in self.plan.scaled.items()],
            },
        }

    def _scale(self, k: int, mode: Mode) -> dict[str, Any]:
        tallies = self.scaled[k] if k in self.extra else self.tallies[mode.name]
        return {"mode": mode.name, "k": k, "tensors": {name: tally.shares() for name, tally in tallies.items()}}

    def _mode(self, mode: Mode, products: dict[str, Tensor], total: Tensor) -> dict[str, Any]:
        dtypes = self.dtypes[mode.name]
        tallies, stagnation = self.tallies[mode.name], self.stagnation[mode.dtype]
        of_parameters = {name: tally for name, tally in tallies.items() if isinstance(tally, Tally)}
        every = {name: (tally.errors(), tally.flushed_errors()) for name, tally in of_parameters.items()}
        tensors = {
            name: _errors(tally.squares, *every[name], products[name]) | _stagnated([stagnation[name]])
            if isinstance(tally, Tally)
            else {}
            for name, tally in tallies.items()
        }
        sums: list[Tensor] = [torch.stack(parts).sum(0) for parts in zip(*every.values(), strict=True)]
        squares = torch.stack([tally.squares for tally in of_parameters.values()]).sum(0)
        whole = _errors(squares, sums[0], sums[1], total) | _stagnated(list(stagnation.values()))
        return {
            "script": script_of(mode),
            "loss_scale": mode.scale,
            "dtype": dtypes["gradients"],
            "weights": dtypes["weights"],
            "total": _values(whole, _summed(list(of_parameters.values()))),
            "tensors": {name: _values(tensors[name], tally.shares()) for name, tally in tallies.items()},
        }


@dataclass(frozen=True)
class Expected:
    """What the reference says of a batch.

    Attributes:
        parameters: as of `Reference.gradients`.
        present: boundary -> where its gradient is not 0; those of the logits are nowhere 0.
    """

    parameters: dict[str, tuple[Tensor, Tensor | None]]
    present: dict[str, Tensor]


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _compare(batch: int, mode: Mode, found: ModeGradients, expected: Expected, tallies: dict[str, Shares]) -> None:
    for name, tally in tallies.items():
        if isinstance(tally, Tally):
            reference, rows = expected.parameters[name]
            tally.compare(batch, _select(found.parameters[name], rows), mode.scale, reference, rows)
        else:
            tally.add(found.boundaries[name], expected.present.get(name))


def _count(found: ModeGradients, expected: Expected, tallies: dict[str, Shares]) -> None:
    for name, shares in tallies.items():
        if name in expected.parameters:
            reference, rows = expected.parameters[name]
            shares.add(_select(found.parameters[name], rows), reference != 0)
        else:
            shares.add(found.boundaries[name], expected.present.get(name))


def _spread(products: Tensor | None) -> dict[str, float | None]:
    if products is None:
        return dict.fromkeys(("gradient", "noise", "noise_error"))
    value, error = statistics.noise(products)
    return {"gradient": statistics.norm_of_mean(products), "noise": value, "noise_error": error}


def _errors(squares: Tensor, errors: Tensor, flushed: Tensor, reference: Tensor) -> dict[str, float | None]:
    def pair(name: str, estimate: Estimate) -> dict[str, float | None]:
        return {name: estimate.value, f"{name}_error": estimate.error}

    found = pair("error_to_noise", statistics.error_to_noise(squares, reference))
    found |= pair("bias", statistics.bias(errors, reference))
    return found | {"bias_flushed": statistics.bias(flushed, reference).value}


def _stagnated(parts: list[Stagnation]) -> dict[str, float | None]:
    updates = sum(part.updates for part in parts)
    return {"stagnated": sum(part.stagnated for part in parts) / updates if updates else None}


def _summed(tallies: Sequence[Shares]) -> dict[str, float]:
    present = max(1, sum(tally.present for tally in tallies))
    return {name: sum(tally.counts[name] for tally in tallies) / present for name in tallies[0].counts}


def _values(*parts: dict[str, Any]) -> dict[str, float | None]:
    values: dict[str, float | None] = dict.fromkeys(VALUES)
    for part in parts:
        values |= part
    return values
