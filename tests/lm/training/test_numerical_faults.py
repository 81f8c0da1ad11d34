"""inf, -inf and nan in losses, activations and gradients of whole runs, against plain PyTorch that skips the batch."""

import json
import math
import signal
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import jobs
import lm.training.loop
from faults import Faults, Plan, put_into
from lm.data.corpus import Corpus, batchify, get_batch
from lm.model.language_model import RNNModel, detach, next_word_loss
from lm.model.model_file import load_model
from lm.options.config import make_args
from lm.options.modes import DEFAULT_MODES
from lm.training.divergence import END, check
from lm.training.loop import Training
from moments import tensors_of
from programs import BATCHES, HALF, MODEL, SCRIPTS, TINY, read_run
from roundoff.errors import RunError
from runs import act_at

VALUES = (math.inf, -math.inf, math.nan)
GRADIENTS = ("encoder.weight", "rnn.weight_hh_l0", "decoder.bias")
PLACES = ("loss", "loss-offset", "encoder", "rnn", "hidden", "score", "scores", *GRADIENTS)
DYNAMIC_MODES = jobs.DYNAMIC
LR, CLIP, BPTT, BATCH = 2.0, 0.25, 5, 4  # those of jobs.SIZE, and the default


def harmless(place: str, value: float) -> bool:
    """Whether the true gradient of a step with this fault is finite, so that the step is right to be applied."""
    return place in ("loss-offset", "hidden") or (place == "score" and value == -math.inf)


class Plain(NamedTuple):
    """A run of `plain_loop`: loss, norm, loss scale and whether applied of each step; what it left."""

    rows: list[tuple[float, float, float, bool]]
    weights: dict[str, Tensor]
    first_bad: str
    """the first parameter whose last gradient is not finite, or "none" """


def plain_loop(monkeypatch: pytest.MonkeyPatch, corpus: Path, mode: str, plan: Plan, steps: int) -> Plain:
    """Training without roundoff, lm.training and apex_compat: what `mode` says, an unfused SGD, and `if finite`."""
    half = "--fp16" in jobs.MODES[mode] or mode == "apex-o2"
    dtypes = {"amp-bf16": torch.bfloat16} | dict.fromkeys(("amp-fp16", "amp-fp16-static", "apex-o1"), torch.float16)
    dtype = dtypes.get(mode)
    scale = 2.0**16 if mode in DYNAMIC_MODES else 128.0 if half or dtype is torch.float16 else 1.0
    text = Corpus(corpus)
    torch.manual_seed(1111)
    model = RNNModel("LSTM", text.vocab_size, 16, 16, 2, 0.2)
    model = model.half() if half else model
    params = list(model.parameters())
    masters = [nn.Parameter(p.detach().float()) for p in params]
    data = batchify(text.train, BATCH, "cpu", "train")
    rows = []
    autocast = torch.autocast("cpu", dtype, enabled=dtype is not None)
    with monkeypatch.context() as patch:
        faults = Faults(plan, model, patch)
        with autocast:
            hidden = model.init_hidden(BATCH)
        for faults.step in range(1, steps + 1):
            model.zero_grad()
            hidden = tuple(torch.where(h.isfinite(), h, 0.0).detach() for h in hidden)
            with autocast:
                loss, hidden = next_word_loss(model, *get_batch(data, (faults.step - 1) * BPTT, BPTT), hidden)
            (loss * scale).backward()
            faults.spoil_gradient()
            for p, m in zip(params, masters, strict=True):
                m.grad = p.grad.float() / scale
            norm = nn.utils.clip_grad_norm_(masters, CLIP)
            applied = bool(norm.isfinite())
            rows.append((loss.item(), norm.item() if applied else math.inf, scale, applied))
            if norm.isfinite():
                for p, m in zip(params, masters, strict=True):
                    m.data.add_(m.grad, alpha=-LR)
                    p.data.copy_(m)
            elif mode in DYNAMIC_MODES:
                scale /= 2
    bad = [name for name, p in model.named_parameters() if not p.grad.isfinite().all()]
    weights = model.state_dict()
    if mode == "apex-o2":  # whose model says its masters
        weights = {name: m.detach() for name, m in zip(weights, masters, strict=True)}
    return Plain(rows, weights, bad[0] if bad else "none")


class Watched(NamedTuple):
    """A run of a script: exit code, stderr, records, weights after each step."""

    code: int
    err: str
    rows: list[tuple[float, float, float, bool]]
    result: dict[str, Any]
    weights: list[dict[str, Tensor]]
    saved: Path


@pytest.fixture
def train(monkeypatch, tmp_path, corpus, capsys) -> Callable[..., Watched]:
    """Runs the script of a mode with faults in it; in no step may they reach a weight."""

    def run(mode: str, plan: Plan, *flags: str) -> Watched:
        script, *mode_flags = jobs.MODES[mode]
        weights = []

        def keep(step: int, model: RNNModel, precision: Any, result: Any) -> None:
            weights.append({name: weight.detach().clone() for name, weight in model.state_dict().items()})
            _, masters = tensors_of(model, precision)
            assert len(masters) == len(weights[-1])
            for weight in (*weights[-1].values(), *masters):
                assert weight.isfinite().all(), step

        put_into(monkeypatch, script, plan, keep)
        run_dir = tmp_path / "run"
        code = jobs.run(monkeypatch, corpus, run_dir, script, *mode_flags, *flags)
        rows = [
            (float(row["loss"]), float(row["grad_norm"]), row["loss_scale"], row["applied"])
            for row in jobs.rows(run_dir)
        ]
        assert [row["step"] for row in jobs.rows(run_dir)] == list(range(1, len(weights) + 1))
        result = json.loads((run_dir / "result.json").read_text())
        assert (result["steps"], result["skipped"]) == (len(rows), sum(not row[3] for row in rows))
        return Watched(code, capsys.readouterr().err, rows, result, weights, Path(f"{run_dir}.pt"))

    return run


def comparable(rows: list[tuple[float, float, float, bool]]) -> list[tuple[str, str, float, bool]]:
    """`rows` with nan equal to nan."""
    return [(str(loss), str(norm), scale, applied) for loss, norm, scale, applied in rows]


def equal_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return list(a) == list(b) and jobs.bits(list(a.values())) == jobs.bits(list(b.values()))


def pairs(places: Sequence[str]) -> list[Any]:
    """Every mode with every place; quick is a quarter of these pairs in the default modes."""
    return [
        pytest.param(mode, place, marks=[] if (i + k) % 4 == 0 and mode in DEFAULT_MODES else [pytest.mark.slow])
        for i, mode in enumerate(jobs.MODES)
        for k, place in enumerate(places)
    ]


@pytest.mark.parametrize(("mode", "place"), pairs(PLACES))
def test_a_run_recovers(train, monkeypatch, corpus, mode, place) -> None:
    """Each fault costs its own step, unless its gradient is true; all else is as in plain PyTorch."""
    plan = {step: (place, value) for step, value in zip((3, 6, 8), VALUES, strict=True)}
    run = train(mode, plan, "--max-steps", "12")
    assert (run.code, run.result["status"]) == (0, "finished")
    skipped = [step for step, fault in plan.items() if not harmless(*fault)]
    assert [step for step, row in enumerate(run.rows, 1) if not row[3]] == skipped
    for step in skipped:
        assert equal_bits(run.weights[step - 1], run.weights[step - 2])
    plain = plain_loop(monkeypatch, corpus, mode, plan, 12)
    assert comparable(run.rows) == comparable(plain.rows)
    assert equal_bits(run.weights[-1], plain.weights)
    saved = load_model(run.saved)[0].state_dict()
    assert equal_bits({name: saved[name].to(weight.dtype) for name, weight in plain.weights.items()}, plain.weights)
    assert math.isfinite(run.result["test_loss"])


@pytest.mark.parametrize(("mode", "place"), pairs([place for place in PLACES if place not in ("hidden", "score")]))
def test_a_fault_that_stays_ends_the_run(train, monkeypatch, corpus, mode, place) -> None:
    plan = {step: (place, VALUES[step % 3]) for step in range(4, 99)}
    run = train(mode, plan, "--max-skipped", "5", "--max-steps", "20")
    plain = plain_loop(monkeypatch, corpus, mode, plan, 8)
    assert comparable(run.rows) == comparable(plain.rows)
    assert (run.code, run.result["status"], run.result["test_loss"]) == (1, "diverged", None)
    assert run.err.count("\n") == 1
    bad = plain.first_bad
    assert bad == ("none" if place == "loss-offset" else place if place in GRADIENTS else "encoder.weight")
    told = ("5 steps in a row, up to step 8", f"loss scale {run.rows[-1][2]:g};", f"non-finite gradient: {bad};")
    for part in (*told, f"{jobs.MODES[mode][0]}.py in mode ", "--lr"):
        assert part in run.err
    assert equal_bits(run.weights[-1], plain.weights)
    assert equal_bits(run.weights[-1], run.weights[2]) == (place != "loss-offset")
    assert not run.saved.exists()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_what_is_finite_in_a_hidden_state_keeps_every_bit(dtype) -> None:
    info = torch.finfo(dtype)
    finite = torch.tensor([0.0, -0.0, 1.0, info.tiny, -info.smallest_normal / 2, info.max, info.min], dtype=dtype)
    bad = torch.tensor(VALUES, dtype=dtype)
    state = torch.cat([finite, bad]).requires_grad_()
    expected = jobs.bits([torch.cat([finite, torch.zeros_like(bad)])])
    pair = detach((state, state))
    for kept in (detach(state), *pair):
        assert jobs.bits([kept]) == expected
        assert not kept.requires_grad


@pytest.fixture
def make(monkeypatch, tmp_path, corpus) -> Callable[..., Training]:
    """Builds the job of a mode."""

    def build(mode: str, *flags: str) -> Training:
        where = ("--run-dir", str(tmp_path / f"run-{len(list(tmp_path.iterdir()))}"), "--save", str(tmp_path / "m.pt"))
        return jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *where, *flags)

    return build


def step_with(job: Training, bias_gradient: float, clip: float = CLIP) -> Any:
    """A step in which only the decoder's bias has a (scaled) gradient, the same everywhere."""
    for p in job.model.parameters():
        p.grad = None
    job.precision.backward(job.model.decoder.bias.sum())
    job.model.decoder.bias.grad.fill_(bias_gradient)
    return job.precision.step(clip)


@pytest.mark.parametrize("mode", DYNAMIC_MODES)
def test_the_dynamic_scale_stays_within_its_bounds(make, mode) -> None:
    """Down to 2^-100 and no further, up to 2^127 (2^24 in FP16_Optimizer) and no further, and down again."""
    job, exponent = make(mode, "--scale-window", "1"), 16
    for gradient, change in ((math.nan, -1), (0.0, 1), (-math.inf, -1)):
        for _ in range(240):
            result = step_with(job, gradient)
            assert (bool(result.applied), float(result.loss_scale)) == (gradient == 0, 2.0**exponent)
            exponent = min(max(exponent + change, -100), 127 if mode == "amp-fp16" else 24)


@pytest.mark.parametrize("mode", DYNAMIC_MODES)
def test_a_scale_at_its_bound_survives_a_checkpoint(make, mode) -> None:
    flags = ("--init-scale", str(2.0**-99), "--scale-window", "2")
    job, resumed = make(mode, *flags), make(mode, *flags)
    for gradient in (math.inf, math.inf, math.inf, 0.0):
        step_with(job, gradient)
    state = job.precision.state_dict()
    resumed.precision.load_state_dict(state)
    assert resumed.precision.state_dict().keys() == state.keys()
    scales = [[float(step_with(each, 0.0).loss_scale) for _ in range(4)] for each in (job, resumed)]
    assert scales[0] == scales[1] == [2.0**-100, 2.0**-99, 2.0**-99, 2.0**-98]


@pytest.mark.parametrize("clip", [CLIP, math.inf])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", [mode for mode in jobs.MODES if "fp32" in mode or "bf16" in mode])
def test_finite_gradients_whose_norm_is_not_are_not_applied(make, mode, optimizer, clip) -> None:
    job = make(mode, "--optimizer", optimizer)
    assert step_with(job, 1.0).applied
    before = jobs.bits(list(job.model.parameters()))
    result = step_with(job, 3e38, clip)
    assert (bool(result.applied), float(result.grad_norm)) == (False, math.inf)
    assert jobs.bits(list(job.model.parameters())) == before
    assert step_with(job, 1.0).applied


def test_a_growing_scale_stops_where_its_reciprocal_would_lose_digits(make) -> None:
    """GradScaler alone would go on to 1.5 * 2^127, which is finite."""
    job = make("amp-fp16", "--scale-window", "1", "--init-scale", str(1.5 * 2.0**126))
    assert [float(step_with(job, 0.0).loss_scale) for _ in range(3)] == [1.5 * 2.0**126, 2.0**127, 2.0**127]


# When a run gives up.

BAD = "decoder.bias"


def test_what_to_try_fits_the_mode(programs) -> None:
    programs.spoil_gradients(set(range(1, 99)), BAD)
    tried = {}
    for mode, (script, *flags) in jobs.MODES.items():
        err = programs.run(script, *TINY, *flags, "--max-skipped", "1", "--run-dir", mode).err
        tried[mode] = err.partition("; try ")[2]
    assert all("--lr" in advice for advice in tried.values())
    half = {"manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-fp16-static", "apex-o1", "apex-o2"}
    assert {mode for mode, advice in tried.items() if "bfloat16" in advice} == half
    static = {"manual", "fp16-optimizer", "amp-fp16-static"}
    assert {mode for mode, advice in tried.items() if "dynamic" in advice} == static
    assert "--dynamic-loss-scale" in tried["fp16-optimizer"]  # this very script has it


@pytest.mark.parametrize("script", ["main_fp16_optimizer", "main_amp"])
def test_a_dynamic_scale_finds_its_way_down(programs, script) -> None:
    """With 2^24 the first steps overflow: as many are skipped as halvings are needed, and the run goes on."""
    run = programs.train(script, *HALF[script], "--init-scale", str(2.0**24), "--log-interval", "4")
    assert sum(not row["applied"] for row in run.steps) == run.result["skipped"]
    assert not any(row["applied"] for row in run.steps[:4])
    assert all(row["applied"] for row in run.steps[-BATCHES:])
    scale = 2.0**24
    for row in run.steps:
        assert row["loss_scale"] == scale
        scale *= 1.0 if row["applied"] else 0.5
    first = next(line for line in run.out.splitlines() if line.startswith("| epoch"))
    assert first.endswith(f" | skipped 4 | loss scale {2**21:g}")


@pytest.mark.parametrize("script", SCRIPTS)
def test_an_overflow_in_any_part_of_a_batch_skips_its_step(programs, script) -> None:
    """In the first part of step 3, and in the last one of step 5. Skipped steps count on a schedule."""
    programs.spoil_gradients({2 * 3 + 1, 5 * 3}, BAD)
    flags = ["--accumulate", "3", "--max-steps", "7", "--lr", "2", "--lr-schedule", "cosine"]
    run = programs.train(script, *HALF[script], *flags)
    assert [row["step"] for row in run.steps if not row["applied"]] == [3, 5]
    halvings = [0, 0, 0, 1, 1, 2, 2] if script != "main" else [0] * 7
    assert [row["loss_scale"] for row in run.steps] == [run.steps[0]["loss_scale"] / 2**n for n in halvings]
    assert [row["lr"] for row in run.steps] == pytest.approx([2 * math.cos(math.pi * n / 14) ** 2 for n in range(7)])


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_learning_rate_that_blows_up(programs, script) -> None:
    """Weights near 1e38 give a loss that is inf, be the gradients finite or not: no mode goes on with that for ever."""
    flags = ["--lr", "1e38", "--clip", "inf", "--max-skipped", "6", "--dropout", "0"]
    done = programs.run(script, *TINY, *flags, *(["--dtype", "float32"] if script == "main_amp" else []))
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"]) == (1, "diverged")
    assert len(run.steps) < BATCHES
    assert {row["loss"] for row in run.steps[-6:] if row["applied"]} <= {"inf", "nan"}


@pytest.mark.parametrize("log_interval", ["1", "3", "4", "5", "200"])
def test_one_step_short_of_max_skipped_goes_on(programs, log_interval) -> None:
    """3 bad, 1 good, 3 bad, ... never 4 in a row, over the ends of epochs too."""
    bad = {step for step in range(1, 2 * BATCHES + 1) if step % 4 != 0}
    models = programs.spoil_gradients(bad, BAD)
    run = programs.train("main_amp", "--max-skipped", "4", "--log-interval", log_interval)
    assert [row["step"] for row in run.steps if not row["applied"]] == sorted(bad)
    assert (run.result["status"], run.result["skipped"], run.result["steps"]) == ("finished", len(bad), 2 * BATCHES)
    assert all(weight.isfinite().all() for weight in models[0].state_dict().values())


@pytest.mark.parametrize("log_interval", ["1", "3", "200"])
@pytest.mark.parametrize(("first", "script"), [(1, "main"), (3, "main_fp16_optimizer"), (BATCHES - 1, "main_amp")])
def test_max_skipped_in_a_row_ends_the_run(programs, script, log_interval, first) -> None:
    """Wherever the bad steps lie, and although good ones follow, the line names step, scale and parameter."""
    programs.spoil_gradients(set(range(first, first + 4)), BAD)
    flags = [*HALF[script], "--max-skipped", "4", "--log-interval", log_interval]
    done = programs.run(script, *TINY, *flags)
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"], run.result["steps"]) == (1, "diverged", len(run.steps))
    assert [row["step"] for row in run.steps if not row["applied"]] == list(range(first, first + 4))
    assert {row["grad_norm"] for row in run.steps if not row["applied"]} == {"inf"}
    for told in (f"up to step {first + 3}", f"loss scale {run.steps[first + 2]['loss_scale']:g}", BAD):
        assert told in done.err
    assert "End of training" not in done.out


def test_a_diverged_run_keeps_the_model_of_an_earlier_epoch(programs) -> None:
    programs.spoil_gradients(set(range(BATCHES + 1, 99)), BAD)
    done = programs.run("main", *TINY, "--max-skipped", "4")
    run = read_run(programs.folder / "run")
    assert (done.code, len(run.epochs)) == (1, 1)
    model, _ = load_model(programs.folder / MODEL)
    assert all(weight.isfinite().all() for weight in model.parameters())
    assert run.result["tokens_per_second"] > 0


GUESSING = math.log(24)  # 18 words, and 6 scores that only pad


@pytest.mark.parametrize("log_interval", ["5", "200"])
@pytest.mark.parametrize("mode", [*DEFAULT_MODES, "amp-fp32"])
def test_a_finite_explosion_has_diverged(programs, mode, log_interval) -> None:
    """Every number in it is finite, and no model that was trained is as bad: it was "finished", with exit code 0."""
    script, *flags = jobs.MODES[mode]
    flags += [*TINY, "--lr", "30000", "--log-interval", log_interval, *jobs.if_dynamic(mode, "--init-scale", "1")]
    done = programs.run(script, *flags)
    run = read_run(programs.folder / "run")
    assert all(row["applied"] for row in run.steps)
    assert (done.code, run.result["status"], run.result["test_loss"], run.result["steps"]) == (
        *(1, "diverged", None),
        len(run.steps),
    )
    assert (len(run.epochs), run.epochs[0]["valid_ppl"]) == (1, "inf")
    first = 1 + max(row["step"] for row in run.steps if row["loss"] <= 10 * GUESSING)
    told = f"has diverged: the validation loss of epoch 1 is {run.epochs[0]['valid_loss']:.4g} nats a word, where "
    assert (
        f"{told}guessing costs 3.2; from step {first} on no training loss is below 32; try a smaller --lr" in done.err
    )
    assert done.err.count("\n") == 1
    assert not (programs.folder / MODEL).exists()
    assert "has diverged, and would again" in programs.refuse(script, "--resume", "run")


def scripted(monkeypatch, *losses: float) -> None:
    """Let evaluations have these results, in turn."""
    found = iter(losses)
    monkeypatch.setattr(lm.training.loop, "evaluate", lambda *_: next(found))


@pytest.mark.parametrize(
    ("losses", "code"),
    [
        ((700.0, 5.0, 5.0), 0),  # it got over it
        ((5.0, 700.0, 5.0), 0),
        ((5.0, 5.0, 9.9 * GUESSING), 0),
        ((5.0, 5.0, 10.1 * GUESSING), 1),
        ((700.0, 690.0, 690.0), 1),
        ((5.0, 5.0, math.nan), 1),
        ((5.0, 5.0, math.inf), 1),
        ((5.0, math.inf), 1),
        ((710.0,), 1),
        ((math.nan,), 1),
    ],
)
def test_which_losses_are_those_of_a_run_that_diverged(programs, monkeypatch, losses, code) -> None:
    scripted(monkeypatch, *losses)
    done = programs.run("main", *TINY)
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"]) == (code, "diverged" if code else "finished")
    assert [float(row["valid_loss"]) for row in run.epochs] == [pytest.approx(loss, nan_ok=True) for loss in losses[:2]]
    what = "test loss" if len(losses) == 3 else f"validation loss of epoch {len(losses)}"
    assert (f"the {what} is {losses[-1]:.4g} nats a word" in done.err) == bool(code)
    assert ("up to step" in done.err) == bool(code), "the training loss was none of it"
    assert (programs.folder / MODEL).exists() == any(loss < 709 for loss in losses[:2])


def test_a_validation_of_nan_is_never_the_best(programs, monkeypatch) -> None:
    """It ends the run, and the model of the epoch before it stays."""
    scripted(monkeypatch, 5.0, 4.0, math.nan, 3.0)
    saved = []
    real = lm.training.loop.save_model
    monkeypatch.setattr(lm.training.loop, "save_model", lambda *args: (saved.append(args), real(*args)))
    done = programs.run("main", *TINY, "--epochs", "9")
    assert (done.code, len(read_run(programs.folder / "run").epochs), len(saved)) == (1, 3, 2)
    assert all(weight.isfinite().all() for weight in load_model(programs.folder / MODEL)[0].parameters())


@pytest.mark.parametrize("script", ["main", "main_fp16_optimizer"])
def test_masters_beyond_fp16_have_diverged(programs, script) -> None:
    """A master of 1e5 is a half weight of inf: such a model was saved as the best, and the run "finished"."""
    done = programs.run(script, *TINY, "--fp16", "--lr", "1e6", "--clip", "inf", "--max-steps", "12")
    run = read_run(programs.folder / "run")
    assert (done.code, run.result["status"], run.result["steps"], run.result["test_loss"]) == (1, "diverged", 12, None)
    assert "has diverged: after step 12 a weight of decoder.bias is not finite; from step 2 on no training" in done.err
    assert "main_amp.py, whose weights are fp32" in done.err
    assert not (programs.folder / MODEL).exists()


def test_a_weight_that_is_not_finite_is_no_model_of_a_run_that_was_stopped(programs) -> None:
    def spoil(model: RNNModel) -> None:
        model.decoder.bias.data[-1] = math.inf

    programs.before_training(spoil)
    with act_at(2, lambda: signal.raise_signal(signal.SIGINT)):
        done = programs.run("main", *TINY, "--dropout", "0")
    assert (done.code, read_run(programs.folder / "run").result["status"]) == (1, "diverged")
    assert "after step 2 a weight of decoder.bias is not finite" in done.err
    assert not (programs.folder / MODEL).exists()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_one_weight_that_is_not_finite_is_enough(dtype) -> None:
    args, model = make_args("main"), RNNModel("GRU", 8, 4, 4, 1, 0.0).to(dtype)
    largest = torch.finfo(dtype).max
    for value in (largest, -largest, math.inf, -math.inf, math.nan):
        model.encoder.weight.data[0, 0] = value
        finite = math.isfinite(value)
        with nullcontext() if finite else pytest.raises(RunError, match="a weight of encoder"):
            check(args, model, None, END, 1.0, 8)


def test_ten_times_what_guessing_costs_is_the_bound_of_the_end_alone() -> None:
    args, model = make_args("main"), RNNModel("GRU", 8, 4, 4, 1, 0.0)
    check(args, model, None, END, 9.9 * math.log(8), 8)
    check(args, model, None, "validation loss of epoch 1", 700.0, 8)
    for name, loss in ((END, 10.1 * math.log(8)), ("validation loss of epoch 1", math.nan)):
        with pytest.raises(RunError, match="has diverged"):
            check(args, model, None, name, loss, 8)
