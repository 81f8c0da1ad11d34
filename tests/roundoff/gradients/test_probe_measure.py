"""Measuring, against plain loops over Python's floats: a reference and modes that no language model stands behind."""

import math
import statistics
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from roundoff.errors import UsageError
from roundoff.gradients.exponents import KS
from roundoff.gradients.measure import Measurement, ParameterGradients, Plan, ScaledGradients
from roundoff.gradients.result import SHARES, VALUES
from roundoff.gradients.tally import Shares

SHAPES = {"table": (9, 3), "between": (4, 5), "matrix": (6, 7), "bias": (5,), "out": (8, 4)}
KINDS = {name: "boundary" if name in ("between", "out") else "parameter" for name in SHAPES}
PARAMETERS = [name for name, kind in KINDS.items() if kind == "parameter"]
N, SEED, LR, CLIP = 5, 3, 0.5, 2.0**12


class Batch(NamedTuple):
    rows: Tensor
    state: float


class Reference:
    """Draws its gradients; those of "table" have rows, and "out" is shown. Each batch doubles its state."""

    kinds = KINDS

    def __init__(self) -> None:
        draw = torch.Generator().manual_seed(7)
        exponents = {name: torch.empty(SHAPES[name]).uniform_(-30, 0, generator=draw) for name in PARAMETERS}
        self.weights = {name: torch.randn(e.shape, generator=draw) * e.exp2() for name, e in exponents.items()}
        self.weights["matrix"][0, :3] = torch.tensor([0.0, 1.0, 2.0**-15])
        self.state = 1.0
        self.last: dict[str, Tensor] = {}
        self.rows = torch.tensor([])

    def batches(self, n: int = N) -> Iterator[Batch]:
        for index in range(n):
            yield Batch(torch.tensor([[7, 0, 4], [2, 3, 8]][index % 2]), self.state)

    def run(self, batch: Batch, see: Callable[[str, Tensor], None]) -> None:
        self.last, self.rows = draw_gradients(batch), batch.rows
        for part in self.last["out"].split(3):
            see("out", part)
        self.state = batch.state * 2

    @property
    def boundaries(self) -> dict[str, Tensor]:
        return {"between": self.last["between"]}

    def gradients(self) -> ParameterGradients:
        whole: ParameterGradients = {name: (self.last[name], None) for name in PARAMETERS}
        return whole | {"table": (self.last["table"][self.rows], self.rows)}


def draw_gradients(batch: Batch) -> dict[str, Tensor]:
    """The true gradients, of magnitudes from far below fp16's smallest number to near its largest."""
    found = {}
    for name, shape in SHAPES.items():
        values = (torch.randn(shape) + 0.5) * torch.empty(shape).uniform_(-33, 9).exp2() * batch.state
        if name == "bias":
            values = (1 + torch.rand(shape)) * 2.0**-29 * batch.state  # of one sign, and flushed in most batches
        elif name != "out":
            values[torch.rand(shape) < 0.1] = 0.0
        found[name] = values.double()
    kept = torch.zeros(9, 1, dtype=torch.float64)
    kept[batch.rows] = 1.0
    return found | {"table": found["table"] * kept}


class Mode:
    """Multiplies the true gradient by the scale and by 1.01, and rounds. It draws more than the reference does."""

    description = "made up"

    def __init__(self, dtype: torch.dtype, scale: float) -> None:
        self.name, self.dtype, self.scale = f"{dtype} {scale}", dtype, scale
        self.seen: list[ScaledGradients] = []

    def dtypes(self) -> dict[str, str]:
        return {"weights": "float32", "gradients": str(self.dtype).removeprefix("torch.")}

    def gradients(self, batch: Batch) -> ScaledGradients:
        found = {name: (g * (self.scale * 1.01)).to(self.dtype) for name, g in draw_gradients(batch).items()}
        parameters = {name: found.pop(name) for name in PARAMETERS}
        torch.rand(1)
        self.seen.append(ScaledGradients(parameters, found))
        return self.seen[-1]


def truth(n: int = N) -> list[dict[str, Tensor]]:
    """The true gradients of all batches, each batch drawing from where the one before it has stopped."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        rows = [torch.tensor([7, 0, 4]), torch.tensor([2, 3, 8])]
        return [draw_gradients(Batch(rows[i % 2], 2.0**i)) for i in range(n)]


Vectors = list[list[float]]


def noise(true: Vectors) -> float:
    return math.sqrt(sum(statistics.variance(column) for column in zip(*true, strict=True)))


def mean_norm(true: Vectors) -> float:
    return math.sqrt(sum(statistics.fmean(column) ** 2 for column in zip(*true, strict=True)))


def error_to_noise(true: Vectors, errors: Vectors) -> float:
    return math.sqrt(statistics.fmean(sum(x * x for x in error) for error in errors)) / noise(true)


def bias_squared(true: Vectors, errors: Vectors) -> float:
    """The mean of all products of two different batches' errors, which has no scatter in it."""
    pairs = [(a, b) for i, a in enumerate(errors) for j, b in enumerate(errors) if i != j]
    products = [math.fsum(x * y for x, y in zip(a, b, strict=True)) for a, b in pairs]
    return statistics.fmean(products) / mean_norm(true) ** 2


def jackknife(figure: Callable[..., float], *families: Vectors) -> float:
    n = len(families[0])
    left = [figure(*([v for j, v in enumerate(family) if j != i] for family in families)) for i in range(n)]
    return math.sqrt((n - 1) / n * sum((value - statistics.fmean(left)) ** 2 for value in left))


def share(found: Vectors, true: Vectors, is_one: Callable[[float], bool]) -> float:
    present = [f for fs, ts in zip(found, true, strict=True) for f, t in zip(fs, ts, strict=True) if t != 0]
    return sum(map(is_one, present)) / len(present)


def shares(found: Vectors, true: Vectors, dtype: torch.dtype) -> dict[str, float]:
    tiny = torch.finfo(dtype).tiny
    return {
        "flushed": share(found, true, lambda f: f == 0),
        "subnormal": share(found, true, lambda f: 0 < abs(f) < tiny),
        "overflowed": share(found, true, lambda f: not math.isfinite(f)),
    }


def figures(found: Vectors, true: Vectors, mode: Mode) -> dict[str, float | None]:
    """All that is said of a parameter, or of several, in a mode; `found` is still scaled.

    Where something overflowed, an error has no size.
    """
    counted = shares(found, true, mode.dtype)
    if counted["overflowed"]:
        return counted | dict.fromkeys(set(VALUES) - set(SHARES) - {"stagnated"})
    pairs = [list(zip(fs, ts, strict=True)) for fs, ts in zip(found, true, strict=True)]
    errors = [[f / mode.scale - t if math.isfinite(f) else 0.0 for f, t in batch] for batch in pairs]
    lost = [[-t if f == 0 else 0.0 for f, t in batch] for batch in pairs]
    square, spread = bias_squared(true, errors), jackknife(bias_squared, true, errors)
    bias = math.sqrt(max(0.0, square))
    certain = (square + spread) < 1.5 * square
    return {
        "critical_batch": (noise(true) / (bias * mean_norm(true))) ** 2 if certain else None,
        "error_to_noise": error_to_noise(true, errors),
        "error_to_noise_error": jackknife(error_to_noise, true, errors),
        "bias": bias,
        "bias_error": math.sqrt(bias**2 + spread) - bias,
        "bias_flushed": math.sqrt(max(0.0, bias_squared(true, lost))),
        **counted,
    }


def stagnated(weights: dict[str, Tensor], true: list[dict[str, Tensor]], names: list[str], dtype: torch.dtype) -> float:
    """An update is lost where it is under half the way from the rounded weight to the next number above it."""
    lost = moved = 0
    for batch in true:
        norm = math.sqrt(sum(x * x for name in PARAMETERS for x in batch[name].flatten().tolist()))
        step = LR * min(1.0, CLIP / (norm + 1e-6))
        for name in names:
            size = weights[name].to(dtype).abs()
            units = size.nextafter(torch.tensor(torch.inf, dtype=dtype)).double() - size.double()
            for gradient, unit in zip(batch[name].flatten().tolist(), units.flatten().tolist(), strict=True):
                moved += gradient != 0
                lost += 0 < abs(gradient * step) < unit / 2
    return lost / moved


def flat(batches: list[dict[str, Tensor]], names: list[str]) -> Vectors:
    return [[x for name in names for x in batch[name].double().flatten().tolist()] for batch in batches]


def everything(seen: list[ScaledGradients]) -> list[dict[str, Tensor]]:
    return [one.parameters | one.boundaries for one in seen]


def close(values: dict[str, float]) -> Any:
    return pytest.approx(values, rel=1e-4, abs=1e-9)


MODES = [(torch.float16, 1.0), (torch.float16, 128.0), (torch.bfloat16, 1.0), (torch.float32, 4.0)]


@pytest.fixture(scope="module")
def measured() -> tuple[dict[str, Any], Reference, list[Mode]]:
    reference, modes = Reference(), [Mode(*mode) for mode in MODES]
    extra = Mode(torch.float16, 2.0**16)
    before = torch.get_rng_state()
    measurement = Measurement(reference, Plan(modes, N, SEED, {7: modes[1], 16: extra}, LR, CLIP))
    measurement.run(reference.batches())
    assert torch.equal(torch.get_rng_state(), before)
    return measurement.figures(), reference, [*modes, extra]


def test_the_reference_alone(measured) -> None:
    found, _, _ = measured
    assert [(t["name"], t["kind"], t["numel"]) for t in found["tensors"]] == [
        (name, KINDS[name], math.prod(SHAPES[name])) for name in SHAPES
    ]
    for tensor in [*found["tensors"], found["total"] | {"kind": "parameter"}]:
        true = flat(truth(), [tensor["name"]] if "name" in tensor else PARAMETERS)
        spread = {name: tensor[name] for name in ("gradient", "noise", "noise_error")}
        if tensor["kind"] == "boundary":
            assert spread == dict.fromkeys(spread)
        else:
            expected = {"gradient": mean_norm(true), "noise": noise(true), "noise_error": jackknife(noise, true)}
            assert spread == close(expected)


@pytest.mark.parametrize("index", range(len(MODES)), ids=map(str, MODES))
def test_each_mode(measured, index: int) -> None:
    found, reference, modes = measured
    mode = modes[index]
    said = found["modes"][mode.name]
    if index == 0:  # something of everything but overflow
        assert [what for what in VALUES if not said["total"][what]] == ["overflowed", "critical_batch"]
        assert said["tensors"]["bias"]["bias_flushed"] > 0.1
    if index == 1:  # which stands here
        assert [what for what in VALUES if said["total"][what]] == [*SHARES, "stagnated"]
        assert [name for name in PARAMETERS if said["tensors"][name]["bias"] is None] == ["table", "matrix"]
    assert (said["loss_scale"], said["description"], said["weights"]) == (mode.scale, "made up", "float32")
    assert said["computes"] == said["dtype"] == str(mode.dtype).removeprefix("torch.")
    for name in [None, *SHAPES]:
        names = PARAMETERS if name is None else [name]
        scaled, true = flat(everything(mode.seen), names), flat(truth(), names)
        values = said["total"] if name is None else said["tensors"][name]
        if name is not None and KINDS[name] == "boundary":
            assert {k: v for k, v in values.items() if v is not None} == close(shares(scaled, true, mode.dtype))
        else:
            lost = {"stagnated": stagnated(reference.weights, truth(), names, mode.dtype)}
            expected = figures(scaled, true, mode) | lost
            assert (values["critical_batch"] is None) == (expected["critical_batch"] is None)
            known = {what for what, x in expected.items() if x is not None}
            assert values.keys() == expected.keys()
            assert {what: values[what] for what in known} == close({what: expected[what] for what in known}), name


def test_the_loss_scales(measured) -> None:
    """Predicted: the true gradients, rounded to fp16 once, at every scale. Measured: through two modes."""
    found, _, modes = measured
    scales = found["scales"]
    assert scales["k"] == list(KS)
    for name in SHAPES:
        true = flat(truth(), [name])
        for index, k in enumerate(KS):
            rounded = [(torch.tensor(batch, dtype=torch.float64) * 2.0**k).half().tolist() for batch in true]
            predicted = {what: values[index] for what, values in scales["predicted"][name].items()}
            assert predicted == shares(rounded, true, torch.float16), (name, k)
    for measured_scale, mode in zip(scales["measured"], [modes[1], modes[4]], strict=True):
        assert (measured_scale["mode"], 2.0 ** measured_scale["k"]) == (mode.name, mode.scale)
        for name, values in measured_scale["tensors"].items():
            scaled = flat(everything(mode.seen), [name])
            assert values == shares(scaled, flat(truth(), [name]), torch.float16), name


def test_an_update_that_is_not_looked_at_is_null() -> None:
    reference, mode = Reference(), Mode(torch.bfloat16, 1.0)
    measurement = Measurement(reference, Plan([mode], 3, SEED))
    measurement.run(reference.batches(3))
    assert measurement.figures()["modes"][mode.name]["total"]["stagnated"] is None


def test_batches_must_be_as_many_as_planned() -> None:
    with pytest.raises(UsageError, match="2 batches are too few"):
        Plan([], 2, SEED)
    for n in (3, 5):
        reference = Reference()
        with pytest.raises(ValueError, match="argument 2"):
            Measurement(reference, Plan([Mode(torch.float16, 1.0)], 4, SEED)).run(reference.batches(n))


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("stored", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
def test_shares_at_their_bounds(dtype: torch.dtype, stored: torch.dtype) -> None:
    """Of products in `dtype` and gradients in `stored`, against comparisons of Python's floats."""
    tiny, small = torch.finfo(dtype).tiny, torch.finfo(stored).smallest_normal * torch.finfo(stored).eps
    edges = [tiny, tiny * (1 - 2.0**-7), tiny / 2, tiny / 4, small, 1.0, torch.finfo(stored).max, torch.inf]
    found = torch.tensor([0.0, *edges, torch.nan], dtype=torch.float64).to(stored)
    found = torch.cat((found, -found))
    counted, masked = Shares(dtype), Shares(dtype)
    counted.add(found)
    assert counted.shares() == shares([found.tolist()], [[1.0] * len(found)], dtype)
    present = torch.arange(len(found)) % 3 > 0
    masked.add(found, present)
    assert masked.shares() == shares([found.tolist()], [present.tolist()], dtype)
