"""`probe` against plain PyTorch: every figure of three models, computed once more by loops in float64."""

import copy
import dataclasses
import math
from collections import UserDict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from jobs import bits
from roundoff import CheckError, MasterWeights, ProbeReport, UsageError, probe
from roundoff.gradients.casts import Wide
from roundoff.gradients.exponents import KS

N, SEED = 6, 5


class CNN(nn.Module):
    """With BatchNorm, dropout, and a bias that BatchNorm takes out again."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.drop, self.out = nn.Dropout(0.25), nn.Linear(4 * 36, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(F.relu(self.norm(self.conv(x)))).flatten(1))


class GPT(nn.Module):
    """One block of causal attention; the embedding is the decoder too, and one layer is used by nobody."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.positions = nn.Embedding(11, 8), nn.Parameter(torch.randn(1, 5, 8) * 0.02)
        self.qkv, self.mix, self.unused = nn.Linear(8, 24), nn.Linear(8, 8), nn.Linear(2, 2)
        self.norm, self.temperature = nn.LayerNorm(8), nn.Parameter(torch.tensor(1.0))
        self.norm.bias.requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.positions
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.mix(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x @ self.embedding.weight.t().to(x.dtype) * self.temperature


class MLP(nn.Module):
    """Of two inputs, one of them whole numbers, and of small gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds, self.hidden, self.out = nn.Embedding(4, 3), nn.Linear(5, 16), nn.Linear(16 + 3, 1)

    def forward(self, numbers: Tensor, kinds: Tensor) -> Tensor:
        return self.out(torch.cat((self.hidden(numbers).tanh(), self.kinds(kinds)), 1)).squeeze(1)


class Case(NamedTuple):
    """A model, its batches, and its loss: as a user writes it, and without a word of dtypes."""

    model: nn.Module
    batches: list[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    plain: Callable[[nn.Module, Any], Tensor]


def cnn() -> Case:
    torch.manual_seed(1)
    batches = [(torch.randn(8, 1, 6, 6), torch.randint(3, (8,))) for _ in range(N)]
    return Case(
        CNN(),
        batches,
        lambda model, batch: F.cross_entropy(model(batch[0]).float(), batch[1]),
        lambda model, batch: F.cross_entropy(wide(model(batch[0].to(dtype_of(model)))), batch[1]),
    )


def gpt() -> Case:
    torch.manual_seed(2)
    batches = [{"tokens": torch.randint(11, (4, 6))} for _ in range(N)]

    def logits(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        return model(batch["tokens"][:, :-1]).flatten(0, 1), batch["tokens"][:, 1:].flatten()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        scores, targets = logits(model, batch)
        return F.nll_loss(torch.log_softmax(scores, -1, dtype=torch.float32), targets)

    def plain(model: nn.Module, batch: Any) -> Tensor:
        scores, targets = logits(model, batch)
        return F.nll_loss(torch.log_softmax(wide(scores), -1), targets)

    return Case(GPT(), batches, loss, plain)


def mlp() -> Case:
    torch.manual_seed(3)
    batches = [[torch.randn(16, 5), torch.randint(4, (16,)), torch.randn(16) * 0.1] for _ in range(N)]
    return Case(
        MLP(),
        batches,
        lambda model, b: (model(b[0], b[1]).float() - b[2].to(torch.float32)).square().mean() * 2.0**-16,
        lambda model, b: (
            (wide(model(b[0].to(dtype_of(model)), b[1])) - wide(b[2].to(dtype_of(model)))).square().mean() * 2.0**-16
        ),
    )


CASES = {"CNN": cnn, "GPT": gpt, "MLP": mlp}


def dtype_of(model: nn.Module) -> torch.dtype:
    return model.get_parameter("out.weight" if hasattr(model, "out") else "mix.weight").dtype


def wide(x: Tensor) -> Tensor:
    return x if x.dtype is torch.float64 else x.float()


class Way(NamedTuple):
    """What a stock mode does, in plain PyTorch."""

    weights: torch.dtype
    autocast: torch.dtype | None
    scale: float
    keeps_norms: bool = False


WAYS = {
    "fp32": Way(torch.float32, None, 1.0),
    "masters-fp16": Way(torch.float16, None, 128.0, keeps_norms=True),
    "masters-bf16": Way(torch.bfloat16, None, 1.0, keeps_norms=True),
    "amp-fp16": Way(torch.float32, torch.float16, 2.0**16),
    "amp-bf16": Way(torch.float32, torch.bfloat16, 1.0),
    "bf16-weights": Way(torch.bfloat16, None, 1.0),
}


def gradients(case: Case, batch: Any, way: Way) -> tuple[float, dict[str, Tensor]]:
    """The loss, and the gradients that are still multiplied by the scale; None is 0."""
    model = copy.deepcopy(case.model)
    for module in model.modules():
        keep = isinstance(module, nn.BatchNorm2d) and way.keeps_norms
        for name, p in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(p.detach().to(p.dtype if keep else way.weights), p.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(way.weights) if buffer.is_floating_point() and not keep else buffer)
    if hasattr(model, "embedding"):
        assert model.embedding.weight.dtype == way.weights
    with torch.autocast("cpu", way.autocast or torch.bfloat16, enabled=way.autocast is not None):
        value = case.plain(model, batch)
    (value * way.scale).backward()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}
    return value.item(), {name: gradient.flatten() for name, gradient in found.items()}


def by_plain_loops(case: Case) -> tuple[list[Any], dict[str, list[Any]], dict[str, list[float]]]:
    """Loss and gradients of each batch in float64, and in each mode with the same dropout masks; and the loss scales.

    A dynamic one backs off until nothing overflows.
    """
    ways, scales = dict(WAYS), {mode: [] for mode in WAYS}
    torch.manual_seed(SEED)
    true: list[Any] = []
    found: dict[str, list[Any]] = {mode: [] for mode in WAYS}
    for batch in case.batches:
        before = torch.get_rng_state()
        true.append(gradients(case, batch, Way(torch.float64, None, 1.0)))
        after = torch.get_rng_state()
        for mode, way in ways.items():
            torch.set_rng_state(before)
            found[mode].append(gradients(case, batch, way))
            while mode == "amp-fp16" and not all(bool(g.isfinite().all()) for g in found[mode][-1][1].values()):
                ways[mode] = way = way._replace(scale=way.scale / 2)
                torch.set_rng_state(before)
                found[mode][-1] = gradients(case, batch, way)
            scales[mode].append(way.scale)
        torch.set_rng_state(after)
    return true, found, scales


def negligible(gradient: Tensor, largest: float) -> Tensor:
    """The gradient without what is rounding alone."""
    own = float(gradient.abs().max())
    if own <= largest * 2.0**-40:
        return torch.zeros_like(gradient)
    return torch.where(gradient.abs() < own * 2.0**-40, 0.0, gradient)


def stacked(true: list[Any], names: list[str]) -> Tensor:
    """Float64 gradients of each batch, as rows."""
    rows = []
    for _, found in true:
        largest = max(float(g.abs().max()) for g in found.values())
        rows.append(torch.cat([negligible(found[name], largest) for name in names]))
    return torch.stack(rows)


def figures(true: Tensor, scaled: Tensor, scale: Tensor, dtype: torch.dtype) -> dict[str, float]:
    """The figures of a tensor by their definitions; rows are batches."""
    n, present = len(true), true != 0
    errors = scaled.double() / scale - true
    variance = true.var(0).sum()
    products = errors @ errors.t()
    square = (products.sum() - products.trace()) / (n * (n - 1)) / true.mean(0).square().sum()
    count = present.sum()
    return {
        "error_to_noise": float((errors.square().sum(1).mean() / variance).sqrt()),
        "bias": math.sqrt(max(0.0, float(square))),
        "flushed": float(((scaled == 0) & present).sum() / count),
        "subnormal": float(((scaled != 0) & (scaled.abs() < torch.finfo(dtype).tiny) & present).sum() / count),
        "overflowed": float((~scaled.isfinite() & present).sum() / count),
    }


def run(case: Case, **options: Any) -> ProbeReport:
    return probe(case.model, case.loss, case.batches, list(WAYS), seed=SEED, **options)


@pytest.fixture(scope="module")
def reports() -> dict[str, ProbeReport]:
    """The report of each case, made once."""
    return {name: run(make()) for name, make in CASES.items()}


def close(values: dict[str, float]) -> Any:
    return pytest.approx(values, rel=2e-5, abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_every_figure_is_that_of_plain_loops(reports, name) -> None:
    case, result = CASES[name](), reports[name].result
    true, found, scales = by_plain_loops(case)
    names = [tensor["name"] for tensor in result["tensors"]]
    expected = [
        p for p, t in case.model.named_parameters() if t.requires_grad and "unused" not in p and p != "conv.bias"
    ]
    assert names == expected
    for tensors, of_all in (*(([name], False) for name in names), (names, True)):
        rows = stacked(true, tensors)
        mean, noise = rows.mean(0), rows.var(0).sum().sqrt()
        spread = result["total"] if of_all else result["tensors"][names.index(tensors[0])]
        assert (spread["gradient"], spread["noise"]) == pytest.approx((float(mean.norm()), float(noise)), rel=1e-5)
        for mode, way in WAYS.items():
            dtype = way.autocast or way.weights
            scaled = torch.stack([torch.cat([g[t].double() for t in tensors]) for _, g in found[mode]])
            of_mode = result["modes"][mode]
            values = of_mode["total"] if of_all else of_mode["tensors"][tensors[0]]
            by_hand = figures(rows, scaled, torch.tensor(scales[mode])[:, None], dtype)
            assert {name: values[name] for name in by_hand} == close(by_hand), (mode, tensors)
            if values["critical_batch"] is not None:
                bias = by_hand["bias"] * float(mean.norm())
                assert values["critical_batch"] == pytest.approx(float(noise) ** 2 / bias**2, rel=1e-3)
    for mode in WAYS:
        differences = [value - exact for (value, _), (exact, _) in zip(found[mode], true, strict=True)]
        expected_forward = (sum(differences) / N, max(map(abs, differences)))
        forward = result["modes"][mode]["forward"]["loss"]
        assert (forward["mean"], forward["largest"]) == pytest.approx(expected_forward, rel=1e-4, abs=1e-9), mode
        assert result["modes"][mode]["loss_scale"] == scales[mode][-1]
    assert scales["amp-fp16"][-1] < 2.0**16 or name != "GPT"


@pytest.mark.parametrize("name", CASES)
def test_flushed_and_overflowed_are_counts_in_fp16_at_every_scale(reports, name) -> None:
    case, result = CASES[name](), reports[name].result
    true, _, _ = by_plain_loops(case)
    for tensor in [t["name"] for t in result["tensors"]]:
        rows = stacked(true, [tensor])
        present = rows != 0
        for i, k in enumerate(KS):
            half = (rows.float().double() * 2.0**k).half()
            shares = {
                "flushed": int(((half == 0) & present).sum()) / int(present.sum()),
                "overflowed": int((half.isinf() & present).sum()) / int(present.sum()),
            }
            predicted = result["scales"]["predicted"][tensor]
            assert {what: predicted[what][i] for what in shares} == pytest.approx(shares, abs=1e-12), (tensor, k)


def state_of(model: nn.Module) -> list[Any]:
    named = [*model.named_parameters(), *model.named_buffers()]
    grads = [p.grad for _, p in model.named_parameters()]
    return [
        *((name, t.dtype, bits([torch.view_as_real(t) if t.is_complex() else t])) for name, t in named),
        *(None if g is None else bits([g]) for g in grads),
        *((name, module.training) for name, module in model.named_modules()),
        bits([torch.get_rng_state()]),
        torch.get_default_dtype(),
    ]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("interrupted", [False, True])
def test_the_model_is_as_it_was(name, interrupted) -> None:
    """Also after Ctrl-C in the middle."""
    case = CASES[name]()
    case.loss(case.model, case.batches[0]).backward()
    case.model.register_buffer("count", torch.tensor(3))
    case.model.register_buffer("phase", torch.ones(2, dtype=torch.complex64))
    if hasattr(case.model, "norm"):
        case.model.norm.eval()
    before, calls = state_of(case.model), 0

    def loss(model: nn.Module, batch: Any) -> Tensor:
        nonlocal calls
        calls += 1
        if interrupted and calls == 9:
            raise KeyboardInterrupt
        return case.loss(model, batch)

    try:
        probe(case.model, loss, case.batches, list(WAYS))
    except KeyboardInterrupt:
        assert interrupted
    backed_off = 3 if name == "GPT" else 0
    assert calls == (
        9 if interrupted else (N + 1) * (1 + len(WAYS)) + 1 + backed_off
    )  # one batch more, to try all once
    assert state_of(case.model) == before


def test_what_the_loss_draws_is_the_same_in_each_mode() -> None:
    """In fp32, since torch draws other numbers in each dtype; so fp32's error is that of rounding."""
    case = mlp()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        noisy = batch[0] + torch.randn_like(batch[0]) + torch.empty_like(batch[0]).uniform_(-1, 1)
        return (model(noisy, batch[1]).float() - batch[2].float()).square().mean() * torch.rand(())

    result = probe(case.model, loss, case.batches, ["fp32", "bf16"]).result
    assert result["modes"]["fp32"]["total"]["error_to_noise"] < 1e-6
    assert 1e-4 < result["modes"]["bf16"]["total"]["error_to_noise"] < 0.1


def test_a_state_is_the_references_in_every_mode() -> None:
    torch.manual_seed(0)
    cell = nn.GRUCell(3, 4)
    batches = [torch.randn(2, 3) for _ in range(5)]
    seen: dict[torch.dtype, list[Tensor]] = {}

    def loss(model: nn.Module, batch: Tensor, state: Tensor) -> Any:
        seen.setdefault(state.dtype, []).append(state)
        after = model(batch, state)
        return {"loss": after.square().mean(), "state": after}, after

    report = probe(cell, loss, batches, ["fp32", "masters-bf16"], state=torch.zeros(2, 4))
    exact, state = copy.deepcopy(cell).double(), torch.zeros(2, 4, dtype=torch.float64)
    for i, batch in enumerate(batches):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            assert torch.equal(seen[dtype][i - len(batches)], state.to(dtype))  # after those that try the first
        state = exact(batch.double(), state).detach()
    largest = {mode: found["forward"]["state"]["largest"] for mode, found in report.result["modes"].items()}
    assert 0 < largest["fp32"] < 1e-6 < largest["masters-bf16"] < 0.1


def test_gradients_of_activations() -> None:
    case = mlp()
    report = probe(case.model, case.loss, case.batches, ["masters-fp16"], watch=["hidden"])
    names = [(tensor["name"], tensor["kind"], tensor["numel"]) for tensor in report.result["tensors"]]
    assert names[1:4] == [
        ("hidden.weight", "parameter", 80),
        ("hidden.bias", "parameter", 16),
        ("hidden (output)", "boundary", 256),
    ]
    exact = copy.deepcopy(case.model).double()
    kept: list[Tensor] = []
    exact.hidden.register_forward_hook(lambda module, args, output: output.register_hook(kept.append) and None)
    for batch in case.batches:
        case.plain(exact, batch).backward()
    half = torch.cat([gradient.flatten() for gradient in kept]).mul(128.0).half()
    predicted = report.result["scales"]["predicted"]["hidden (output)"]["flushed"][7 - KS[0]]
    assert 0 < predicted == pytest.approx(float((half == 0).double().mean()))


@pytest.mark.parametrize(
    ("bounds", "said"),
    [
        ({"error_to_noise": 1.0, "bias": 1.0, "forward": 1.0}, None),
        ({"error_to_noise": "worst"}, None),
        ({"error_to_noise": "below"}, "error to noise is"),
        ({"bias": "worst"}, None),
        ({"bias": "below"}, "bias is"),
        ({"forward": "worst"}, None),
        ({"forward": "below"}, "loss: largest difference is"),
    ],
)
def test_check(reports, bounds, said) -> None:
    """At its largest figure a bound holds, and just below not; the error names where that is."""
    report = reports["GPT"]
    figures: dict[str, tuple[float, str]] = {}
    for mode, found in report.result["modes"].items():
        for tensor, values in {"all parameters": found["total"], **found["tensors"]}.items():
            for figure in ("error_to_noise", "bias"):
                figures[figure] = max(figures.get(figure, (0.0, "")), (values[figure] or 0.0, f"{mode}, {tensor}"))
        figures["forward"] = max(figures.get("forward", (0.0, "")), (found["forward"]["loss"]["largest"], mode))
    exact = {"worst": 1.0, "below": 1 - 1e-9}
    given = {name: figures[name][0] * exact[b] if isinstance(b, str) else b for name, b in bounds.items()}
    if said is None:
        report.check(**given)
        return
    ((name, _),) = given.items()
    with pytest.raises(CheckError) as error:
        report.check(**given)
    assert str(error.value).startswith(figures[name][1])
    assert said in str(error.value)
    assert f"{figures[name][0]:.3g}" in str(error.value)


def test_check_does_not_take_overflow_for_a_small_error() -> None:
    case = cnn()
    scaled = lambda model: MasterWeights(  # noqa: E731
        model.half().parameters(), torch.optim.SGD(model.parameters(), lr=0.1), 2.0**30
    )
    report = probe(case.model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), case.batches, {"fp16": scaled})
    assert report.result["modes"]["fp16"]["total"]["overflowed"] > 0.1
    with pytest.raises(CheckError, match="of the gradient overflowed, and has no error to noise"):
        report.check(error_to_noise=1e9)
    report.check(forward=1.0)


def refused(*args: Any, **options: Any) -> str:
    with pytest.raises(UsageError) as error:
        probe(*args, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


class NoFloat64(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if input.dtype is torch.float64:
            raise NotImplementedError('"linear" not implemented for Double')
        return super().forward(input)


def test_a_module_without_float64_kernels() -> None:
    torch.manual_seed(0)
    model, batches = NoFloat64(3, 2), [torch.randn(4, 3) for _ in range(4)]
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    said = refused(model, loss, batches)
    assert said == (
        'the loss cannot be computed in float64, the reference ("linear" not implemented for Double); let it use the '
        "model that it is given, and cast tensors of its own with .to(); where a kernel is missing, give "
        "reference=torch.float32"
    )
    report = probe(model, loss, batches, reference=torch.float32)
    assert "same model, loss and batch in float32" in str(report)
    assert report.result["modes"]["fp32"]["total"]["error_to_noise"] < 1e-6
    torch.manual_seed(0)
    exact = probe(nn.Linear(3, 2), loss, batches).result["modes"]["amp-bf16"]["total"]["error_to_noise"]
    assert report.result["modes"]["amp-bf16"]["total"]["error_to_noise"] == pytest.approx(exact, rel=0.5)


def test_mistakes() -> None:
    """Each is one line that says what was given and what to do."""
    model, batches = nn.Linear(3, 2), [torch.randn(4, 3) for _ in range(4)]
    loss = lambda m, b: m(b).square().mean()  # noqa: E731
    frozen, complexes = nn.Linear(3, 2).requires_grad_(False), nn.Linear(3, 2, dtype=torch.complex64)
    infinite = [torch.full((4, 3), torch.inf)] * 3
    historic = nn.Linear(3, 2)
    historic.last = historic.weight * 2

    def half_only(model: nn.Module) -> Any:
        raise ValueError("no such thing")

    for said, *given in (
        ("1 batches are too few", model, loss, batches[:1]),
        ("a tensor of shape (4, 2) as the loss; it must be a", model, lambda m, b: m(b), batches),
        ("gave a dict without 'loss'; that entry", model, lambda m, b: {"logits": m(b)}, batches),
        ("does not depend on the model's parameters", model, lambda m, b: b.sum(), batches),
        ("no parameter that requires grad", frozen, loss, batches),
        ("is torch.complex64; a probe starts from fp32", complexes, loss, batches),
        (
            "is torch.float64; a probe starts from fp32 weights: give model.float()",
            nn.Linear(3, 2).double(),
            loss,
            batches,
        ),
        ("parameter weight has no shape yet; let the model see", nn.LazyLinear(2), loss, batches),
        ("mode 'amp-pf16' is no stock mode; did you mean amp-fp16? there are", model, loss, batches, ["amp-pf16"]),
        ("fails for the model as it is: too many indices", model, lambda m, b: m(b)[0, 0, 0], batches),
        (
            "let it use the model that it is given, and cast",
            model,
            lambda m, b: loss(model, b) + 0 * m(b).sum(),
            batches,
        ),
        ("modes is 'fp32'; give a list", model, loss, batches, "fp32"),
        ("modes names fp32 twice", model, loss, batches, ["fp32", "fp32"]),
        ("mode half_only cannot be built (no such thing)", model, loss, batches, [half_only]),
        ("in float64; give batches of finite loss", model, loss, infinite),
        ("cannot be copied, which a probe does for each mode: last is computed by a forward", historic, loss, batches),
    ):
        assert said in refused(*given), said
    assert "has no such submodule; it has out" in refused(
        nn.Sequential().append(model), loss, batches, watch=["encoder"]
    ).replace("has 0", "has out")
    assert "must return a pair" in refused(model, lambda m, b, s: m(b).sum(), batches, state=torch.zeros(1))
    assert "allowed are torch.float64 and torch.float32" in refused(model, loss, batches, reference=torch.float16)


class OnlyFloat(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        if self.weight.dtype is torch.bfloat16:
            raise RuntimeError('"addmm" not implemented for BFloat16')
        return super().forward(input)


def test_a_mode_that_cannot_run_here_is_left_out_and_named(capsys) -> None:
    given = OnlyFloat(3, 2), lambda m, b: m(b).square().mean(), [torch.randn(4, 3)] * 3
    why = 'mode bf16-weights cannot run here ("addmm" not implemented for BFloat16)'
    assert refused(*given, ["bf16-weights"]) == why
    capsys.readouterr()
    report = probe(*given, ["bf16-weights", "fp32"])
    assert list(report.result["modes"]) == ["fp32"]
    assert f"| probe: {why}; it is left out\n" in capsys.readouterr().out
    assert f"{why}; it is left out." in str(report)
    with pytest.raises(CheckError, match=r"bf16-weights cannot run here .*, so nothing holds it to a bound"):
        report.check(error_to_noise=1.0)


class Noisy(nn.Linear):
    """Draws random numbers that nobody can put back."""

    random = torch.Generator().manual_seed(0)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input + torch.randn(input.shape, generator=self.random).to(input))


class Counting(nn.Linear):
    """Changes an attribute in each forward pass."""

    calls = 0

    def forward(self, input: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(input * self.calls)


class OwnAutocast(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return super().forward(input)


@pytest.mark.parametrize(("kind", "suspicious"), [(Noisy, True), (OwnAutocast, True), (Counting, False)])
def test_an_error_that_no_precision_makes_is_told(kind, suspicious) -> None:
    """An attribute makes none: each pass has a copy of the model."""
    torch.manual_seed(0)
    batches = [torch.randn(4, 3) for _ in range(4)]
    result = probe(kind(3, 2), lambda m, b: m(b).float().square().mean(), batches, ["fp32"]).result
    assert (result["modes"]["fp32"]["total"]["error_to_noise"] > 1e-3) is suspicious
    assert result["advice"][0].startswith("Beware: the gradient of fp32 itself is ") is suspicious


def test_sparse_gradients() -> None:
    torch.manual_seed(0)
    batches = [torch.randint(9, (8, 2)) for _ in range(4)]
    found = []
    for sparse in (True, False):
        torch.manual_seed(1)
        model = nn.Sequential(nn.Embedding(9, 4, sparse=sparse), nn.Flatten(), nn.Linear(8, 3))
        found.append(probe(model, lambda m, b: m(b).square().mean(), batches, ["fp32", "masters-bf16"]).result["modes"])
    assert found[0] == found[1]


def test_saved_files_are_those_of_the_report(reports, tmp_path) -> None:
    from roundoff.gradients.result import read_probe

    reports["CNN"].save(tmp_path / "deep" / "probe")
    assert read_probe(tmp_path / "deep" / "probe" / "probe.json") == reports["CNN"].result
    assert (tmp_path / "deep" / "probe" / "probe.png").read_bytes().startswith(b"\x89PNG")
    assert "CNN of 483 parameters; 6 batches." in (tmp_path / "deep" / "probe" / "probe.html").read_text()


class Clamping(nn.Linear):
    """Writes to its weight in each forward pass."""

    def forward(self, input: Tensor) -> Tensor:
        with torch.no_grad():
            self.weight.clamp_(-0.1, 0.1)
        return super().forward(input)


class Naive:
    """Steps whatever the gradient is."""

    param_groups: list[Any]

    def __init__(self, model: nn.Module) -> None:
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)

    def forward(self) -> Any:
        return torch.enable_grad()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, max_norm: float) -> None:
        self.optimizer.step()


WRITES = {
    "clipped weights": (Clamping(3, 2), lambda m, b: m(b).square().mean(), "fp32"),
    "rows of an embedding": (
        nn.Sequential(nn.Embedding(9, 4, max_norm=0.5), nn.Linear(4, 2)),
        lambda m, b: m(b.long() % 9).square().mean(),
        "fp32",
    ),
    "a step of inf": (nn.Linear(3, 2), lambda m, b: m(b).square().mean(), Naive),
    "the batch": (nn.Linear(3, 2), lambda m, b: m(b.mul_(0.5)).square().mean(), "fp32"),
    "the batch's gradient": (
        nn.Linear(3, 2),
        lambda m, b: torch.autograd.grad(m(b.requires_grad_()).tanh().sum(), b, create_graph=True)[0].square().mean(),
        "fp32",
    ),
}


@pytest.mark.parametrize("name", WRITES)
def test_what_a_pass_writes_reaches_nobody(name: str) -> None:
    model, loss, mode = WRITES[name]
    torch.manual_seed(0)
    batches = [torch.randn(4, 3).mul(3).abs() for _ in range(4)]
    before = state_of(model), bits(batches)
    modes = {"first": mode, "second": "fp32", "bf16": "amp-bf16"}
    result = probe(model, loss, batches, modes).result
    assert (state_of(model), bits(batches)) == before
    assert [b.requires_grad for b in batches] == [False] * 4
    assert result["modes"]["second"]["total"]["error_to_noise"] < 1e-5
    assert result["modes"]["bf16"]["total"]["error_to_noise"] < 0.2


DRAWS = {
    "normal": lambda x: torch.normal(x, 1.0),
    "normal of a shape": lambda x: torch.normal(0.0, 1.0, x.shape),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli in place": lambda x: torch.empty_like(x).bernoulli_(x.sigmoid()),
    "a distribution": lambda x: torch.distributions.Normal(x, 1.0).rsample(),
    "out": lambda x: torch.rand(x.shape, out=torch.empty_like(x)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_every_way_to_draw_draws_the_same(name: str) -> None:
    """And leaves the generator alike, so that later masks are too."""
    torch.manual_seed(0)
    model, batches = nn.Linear(40, 20), [torch.randn(8, 40) for _ in range(4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        drawn = DRAWS[name](batch * 0 + 0.25)
        return F.dropout(model(batch + drawn.to(batch.dtype))).square().mean()

    result = probe(model, loss, batches, ["fp32", "bf16"]).result
    assert result["modes"]["fp32"]["total"]["error_to_noise"] < 1e-5
    assert result["modes"]["bf16"]["total"]["error_to_noise"] < 0.1
    assert not result["advice"][0].startswith("Beware")


def test_a_loss_that_uses_another_model_leaves_that_as_it_is() -> None:
    model, batches = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 2)), [torch.randint(9, (5,)) for _ in range(3)]
    said = refused(model, lambda _, b: model(b).square().mean(), batches)
    assert said == "no gradient reaches the model that the loss is given; let loss(model, batch) use that one"
    assert all(p.grad is None for p in model.parameters())


def test_batches_that_do_not_differ_have_no_noise() -> None:
    torch.manual_seed(0)
    model, batch = nn.Linear(3, 2), torch.randn(4, 3)
    report = probe(model, lambda m, b: m(b).square().mean(), [batch] * 8, ["bf16"])
    assert report.result["modes"]["bf16"]["total"]["error_to_noise"] is None
    assert report.result["modes"]["bf16"]["total"]["critical_batch"] is None
    with pytest.raises(CheckError, match="there is no error to noise, since its gradient is the same in all batches"):
        report.check(error_to_noise=1.0)
    report.check(bias=1.0)
    for bound in (math.nan, -1.0, "0.1"):
        with pytest.raises(UsageError, match="give a number from 0 on as its bound"):
            report.check(bias=bound)


@dataclasses.dataclass
class Pair:
    x: Tensor
    name: str = "pair"


class State(NamedTuple):
    h: Tensor


@pytest.mark.parametrize(
    "wrap",
    [lambda x: Pair(x), lambda x: UserDict(x=x), lambda x: SimpleNamespace(x=x.double().float())],
    ids=["dataclass", "UserDict", "object"],
)
def test_batches_of_other_kinds(wrap) -> None:
    """What the probe does not know is given as it is."""
    torch.manual_seed(0)
    batches = [wrap(torch.randn(4, 3)) for _ in range(4)]

    def loss(model: nn.Module, batch: Any) -> Tensor:
        x = batch["x"] if isinstance(batch, UserDict) else batch.x
        return model(x.to(model.weight)).square().mean()

    result = probe(nn.Linear(3, 2), loss, batches, ["fp32", "masters-bf16"]).result
    assert result["modes"]["fp32"]["total"]["error_to_noise"] < 1e-6


def test_states_of_other_kinds() -> None:
    torch.manual_seed(0)
    batches = [torch.randn(2, 3) for _ in range(4)]
    found = []
    for wrap, read in ((State, lambda s: s.h), (lambda h: {"h": h}, lambda s: s["h"])):
        torch.manual_seed(1)
        cell = nn.GRUCell(3, 4)

        def loss(model: nn.Module, batch: Tensor, state: Any, wrap=wrap, read=read) -> Any:
            after = model(batch, read(state))
            return after.square().mean(), wrap(after)

        found.append(probe(cell, loss, batches, ["fp32"], state=wrap(torch.zeros(2, 4))).result["modes"])
    assert found[0] == found[1]


def test_a_loader_leaves_the_random_state_alone() -> None:
    loader = torch.utils.data.DataLoader(torch.randn(16, 3), 4, shuffle=True)
    model, before = nn.Linear(3, 2), torch.get_rng_state()
    probe(model, lambda m, b: m(b).square().mean(), loader, ["fp32"])
    assert torch.equal(torch.get_rng_state(), before)


def test_casts_of_every_spelling_stay_wide() -> None:
    torch.manual_seed(0)
    weights, batches = torch.rand(2), [torch.randn(4, 3) for _ in range(4)]

    def loss(model: nn.Module, batch: Tensor) -> Tensor:
        y = model(batch)
        y = y.type_as(weights).to(weights) * y.type(torch.FloatTensor) + y.type("torch.FloatTensor")
        return (y.cfloat() * y.to(torch.complex64)).abs().mean()

    result = probe(nn.Linear(3, 2), loss, batches, ["fp32"]).result
    assert 0 < result["modes"]["fp32"]["forward"]["loss"]["largest"] < 1e-5
    exact = nn.Linear(3, 2).double()
    with Wide(torch.float64):
        assert loss(exact, batches[0].double()).dtype is torch.float64


def test_mistakes_of_names() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2))
    model.add_module("alias", model[0])
    batches, loss = [torch.randn(4, 3) for _ in range(4)], lambda m, b: m[0](b).square().mean()
    assert probe(model, loss, batches, ["fp32"], watch=["alias"]).result["tensors"][-1]["name"] == "alias (output)"
    assert "watch is '0'; give a list" in refused(model, loss, batches, watch="0")
    assert "a build without a name; give a dict" in refused(model, loss, batches, [lambda m: None])
    assert "its build returned None; it must return a Precision" in refused(model, loss, batches, {"x": lambda m: None})
    assert "seed is -1; give a whole number" in refused(model, loss, batches, seed=-1)
    assert "job cannot be written as JSON" in refused(model, loss, batches, job={"x": object()})

    class Output(nn.Linear):
        def forward(self, x: Tensor) -> Any:
            return {"y": super().forward(x)}

    output = nn.Sequential(Output(3, 2))
    said = refused(output, lambda m, b: m(b)["y"].square().mean(), batches, watch=["0"])
    assert said == "the output of 0 is a dict; watch a submodule that returns a tensor"
