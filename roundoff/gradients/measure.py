"""Run a reference and precision modes over the same batches, and make the figures of probe.json. Take no step.

The client brings the reference, the modes and the batches. Nothing here knows a model, a loss or what a batch holds.
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from roundoff.device import get_random_states, random_state_kept, release_freed_memory, set_random_states
from roundoff.errors import UsageError
from roundoff.gradients import statistics
from roundoff.gradients.exponents import KS, Exponents, predict
from roundoff.gradients.result import VALUES
from roundoff.gradients.statistics import LEAST_BATCHES, Estimate, Sketch
from roundoff.gradients.tally import Differences, Gradients, Shares, Stagnation, Tally, pieces

SEED_OF_SIGNS = 0

Batch = Any
"""Whatever the client's reference and modes take."""

ParameterGradients = dict[str, tuple[Tensor, Tensor | None]]
"""Name of a parameter -> its gradient, and the numbers of the rows that the gradient has; None for all rows."""


class Reference(Protocol):
    """Computes the true gradient of a batch, in float64."""

    @property
    def kinds(self) -> Mapping[str, str]:
        """Return name -> "parameter" or "boundary": all that is measured, in forward order."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Return name of a parameter -> its weight, fp32."""

    @property
    def boundaries(self) -> Mapping[str, Tensor]:
        """Return name of a boundary -> its gradient in the last batch, but for those that `run` shows."""

    def run(self, batch: Batch, see: Callable[[str, Tensor], None]) -> None:
        """Compute all gradients of `batch`.

        A boundary's gradient that is too large to keep goes to `see` in parts, each with the boundary's name. Its
        elements are taken to be nowhere 0.
        """

    @property
    def outputs(self) -> Mapping[str, Tensor]:
        """Return name -> what the forward pass of the last batch gave: "loss", and others; vectors on the CPU."""

    def gradients(self) -> ParameterGradients:
        """Return the parameters' gradients in the last batch.

        Rows that are left out have no gradient in any mode.
        """


@dataclass(frozen=True)
class ScaledGradients:
    """A mode's gradients of a batch, by name, in the mode's dtypes and still multiplied by its loss scale.

    Attributes:
        parameters: every parameter's, whole.
        boundaries: every boundary's.
        outputs: of the forward pass, as `Reference.outputs`.
    """

    parameters: dict[str, Tensor]
    boundaries: dict[str, Tensor]
    outputs: dict[str, Tensor] = field(default_factory=dict)


class Mode(Protocol):
    """Computes the gradient of a batch as training in one precision would."""

    @property
    def name(self) -> str:
        """Return the mode's key in probe.json."""

    @property
    def description(self) -> str:
        """Return who trains in this mode, in a word."""

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of the products."""

    @property
    def scale(self) -> float:
        """Return the loss scale."""

    def dtypes(self) -> Mapping[str, str]:
        """Return the names of the dtypes of "weights" and "gradients".

        Raises:
            UsageError: this machine cannot run the mode.
        """

    def gradients(self, batch: Batch) -> ScaledGradients:
        """Return the gradients of `batch`. The mode draws from torch's generator what the reference draws."""


@dataclass(frozen=True)
class Plan:
    """Says what to measure.

    Attributes:
        modes: to be compared with the reference.
        batches: how many there will be.
        seed: of all that the batches, the reference and the modes draw.
        scaled: exponent of a loss scale in fp16 -> mode that measures it, which may be one of `modes`.
        lr: of an SGD update; None leaves stagnation out.
        clip: the largest norm of the gradient in that update.
        device: on which reference and modes draw random numbers.

    Raises:
        UsageError: there are too few batches.
    """

    modes: Sequence[Mode]
    batches: int
    seed: int
    scaled: Mapping[int, Mode] = field(default_factory=dict)
    lr: float | None = None
    clip: float = math.inf
    device: str = "cpu"

    def __post_init__(self) -> None:
        if self.batches < LEAST_BATCHES:
            raise UsageError(
                f"{self.batches} batches are too few: a deviation and its error take {LEAST_BATCHES}; give more"
            )


class Measurement:
    """Counts what the reference and the modes compute, batch by batch.

    Args:
        reference: the true gradients.
        plan: what to measure.

    Raises:
        UsageError: this machine cannot run one of the modes.
    """

    def __init__(self, reference: Reference, plan: Plan) -> None:
        self.reference, self.plan = reference, plan
        self.dtypes = {mode.name: mode.dtypes() for mode in plan.modes}
        self.names = reference.kinds
        self.numel = {name: weight.numel() for name, weight in reference.weights.items()}
        generator, n = torch.Generator().manual_seed(SEED_OF_SIGNS), plan.batches
        sketches = {name: Sketch(weight.shape, n, generator) for name, weight in reference.weights.items()}
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
        self.forward: dict[str, dict[str, Differences]] = {mode.name: {} for mode in plan.modes}

    def run(self, batches: Iterable[Batch]) -> None:
        """Measure all `batches`, and leave torch's random state as it was.

        A batch is asked for when the reference has seen the one before it, so that it can carry the reference's state.

        Raises:
            ValueError: there are more or fewer batches than planned.
        """
        with random_state_kept(self.plan.device):
            torch.manual_seed(self.plan.seed)
            for index, batch in zip(range(self.plan.batches), batches, strict=True):
                self._measure(index, batch)

    def _measure(self, index: int, batch: Batch) -> None:
        release_freed_memory()
        before = get_random_states(self.plan.device)
        expected = self._expect(index, batch)
        after = get_random_states(self.plan.device)
        for mode in self.plan.modes:
            set_random_states(before, self.plan.device)
            self._compare(index, mode, batch, expected)
        for k, mode in self.extra.items():
            set_random_states(before, self.plan.device)
            _count(mode.gradients(batch), expected, self.scaled[k])
        set_random_states(after, self.plan.device)

    def _compare(self, index: int, mode: Mode, batch: Batch, expected: "_Expected") -> None:
        """Run a mode. Its gradients are gone at the end, before there are those of the next one."""
        found = mode.gradients(batch)
        _compare(index, mode, found, expected, self.tallies[mode.name])
        self._compare_outputs(mode.name, found.outputs)

    def _compare_outputs(self, mode: str, found: Mapping[str, Tensor]) -> None:
        for name, output in found.items():
            self.forward[mode].setdefault(name, Differences()).add(output, self.reference.outputs[name])

    def _expect(self, index: int, batch: Batch) -> "_Expected":
        """Run the reference, and count what is counted of its gradients alone."""
        shown: dict[str, int] = {}

        def see(name: str, part: Tensor) -> None:
            self.exponents[name].add(part)
            shown[name] = shown.get(name, 0) + part.numel()

        self.reference.run(batch, see)
        parameters, boundaries = self.reference.gradients(), self.reference.boundaries
        for name, (gradient, rows) in parameters.items():
            self.gradients[name].add(index, gradient, rows)
            self.exponents[name].add(gradient)
        for name, gradient in boundaries.items():
            self.exponents[name].add(gradient)
        self.numel |= shown | {name: gradient.numel() for name, gradient in boundaries.items()}
        self._count_stagnation(parameters)
        return _Expected(parameters, {name: gradient != 0 for name, gradient in boundaries.items()})

    def _count_stagnation(self, parameters: ParameterGradients) -> None:
        if self.plan.lr is None:
            return
        norm = math.hypot(*(float(torch.linalg.vector_norm(gradient)) for gradient, _ in parameters.values()))
        step = self.plan.lr * min(1.0, self.plan.clip / (norm + 1e-6))  # as torch.nn.utils.clip_grad_norm_
        for name, (gradient, rows) in parameters.items():
            weights = pieces(_select(self.reference.weights[name], rows))
            for some_weights, some_gradients in zip(weights, pieces(gradient), strict=True):
                update = (some_gradients.float() * step).abs_()
                for tallies in self.stagnation.values():
                    tallies[name].add(some_weights, update)

    def figures(self, left_out: Collection[str] = ()) -> dict[str, Any]:
        """Return `tensors`, `total`, `modes` and `scales` of probe.json, without the parameters `left_out`."""
        kept = [name for name in self.names if name not in left_out]
        products = {name: self.gradients[name].products() for name in kept if name in self.gradients}
        total = torch.stack(list(products.values())).sum(0)
        return {
            "tensors": [
                {"name": name, "kind": kind, "numel": self.numel[name]} | _spread(products.get(name))
                for name, kind in self.names.items()
                if name in kept
            ],
            "total": _spread(total),
            "modes": {mode.name: self._mode(mode, kept, products, total) for mode in self.plan.modes},
            "scales": {
                "k": list(KS),
                "predicted": {name: predict(self.exponents[name]) for name in kept},
                "measured": [self._scale(k, mode, kept) for k, mode in self.plan.scaled.items()],
            },
        }

    def _scale(self, k: int, mode: Mode, kept: Sequence[str]) -> dict[str, Any]:
        tallies = self.scaled[k] if k in self.extra else self.tallies[mode.name]
        return {"mode": mode.name, "k": k, "tensors": {name: tallies[name].shares() for name in kept}}

    def _mode(self, mode: Mode, kept: Sequence[str], products: dict[str, Tensor], total: Tensor) -> dict[str, Any]:
        dtypes = self.dtypes[mode.name]
        tallies = {name: self.tallies[mode.name][name] for name in kept}
        stagnation = {name: self.stagnation[mode.dtype][name] for name in products}
        of_parameters = {name: tally for name, tally in tallies.items() if isinstance(tally, Tally)}
        every = {name: (tally.errors(), tally.flushed_errors()) for name, tally in of_parameters.items()}
        tensors = {
            name: _errors([tally], tally.squares, *every[name], products[name]) | _stagnated([stagnation[name]])
            if isinstance(tally, Tally)
            else {}
            for name, tally in tallies.items()
        }
        sums: list[Tensor] = [torch.stack(parts).sum(0) for parts in zip(*every.values(), strict=True)]
        squares = torch.stack([tally.squares for tally in of_parameters.values()]).sum(0)
        whole = _errors(list(of_parameters.values()), squares, sums[0], sums[1], total)
        whole |= _stagnated(list(stagnation.values()))
        return {
            "description": mode.description,
            "forward": {name: of_name.figures() for name, of_name in self.forward[mode.name].items()},
            "loss_scale": mode.scale,
            "computes": str(mode.dtype).removeprefix("torch."),
            "dtype": dtypes["gradients"],
            "weights": dtypes["weights"],
            "total": _values(whole, _summed(list(of_parameters.values()))),
            "tensors": {name: _values(tensors[name], tally.shares()) for name, tally in tallies.items()},
        }


@dataclass(frozen=True)
class _Expected:
    """The reference's gradients of a batch.

    Attributes:
        parameters: as `Reference.gradients` returns them.
        present: boundary -> where its gradient is not 0. A boundary that is missing is nowhere 0.
    """

    parameters: ParameterGradients
    present: dict[str, Tensor]


def _select(tensor: Tensor, rows: Tensor | None) -> Tensor:
    return tensor if rows is None else tensor[rows]


def _compare(index: int, mode: Mode, found: ScaledGradients, expected: _Expected, tallies: dict[str, Shares]) -> None:
    for name, tally in tallies.items():
        if isinstance(tally, Tally):
            reference, rows = expected.parameters[name]
            tally.compare(index, _select(found.parameters[name], rows), mode.scale, reference, rows)
        else:
            tally.add(found.boundaries[name], expected.present.get(name))


def _count(found: ScaledGradients, expected: _Expected, tallies: dict[str, Shares]) -> None:
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


def _errors(
    tallies: Sequence[Shares], squares: Tensor, errors: Tensor, flushed: Tensor, reference: Tensor
) -> dict[str, float | None]:
    """Return the figures of errors; none where something overflowed, since an infinite error has no size."""
    if any(tally.counts["overflowed"] for tally in tallies):
        return {}

    def pair(name: str, estimate: Estimate) -> dict[str, float | None]:
        return {name: estimate.value, f"{name}_error": estimate.error}

    found = pair("error_to_noise", statistics.error_to_noise(squares, reference))
    found |= pair("bias", statistics.bias(errors, reference))
    found["critical_batch"] = statistics.critical_batch(statistics.bias(errors, reference), reference)
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
