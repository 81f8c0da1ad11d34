"""One contract for every implementation of the seam, with the faults injected that it has to withstand."""

import io
import math
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch

import jobs
from checkpoints import torch_saved_on_gpu
from lm.data.corpus import get_batch
from lm.model.language_model import KINDS, next_word_loss
from lm.model.model_file import load_model
from lm.training.evaluation import evaluate
from lm.training.loop import Training
from roundoff.precision import MasterWeights
from roundoff.runs.tensor_file import load_tensors, save_tensors
from runs import plain

FP16_MODES = [mode for mode in jobs.MODES if "fp32" not in mode and "bf16" not in mode]
DYNAMIC_MODES = jobs.DYNAMIC


@pytest.fixture
def make(monkeypatch, tmp_path, corpus, device) -> Callable[..., Training]:
    """Builds the job of a mode through its own script; an optimizer class in place of fused SGD if given."""

    def build(mode: str, *flags: str, optimizer: Any = None) -> Training:
        count = len(list(tmp_path.glob("run-*")))
        where = ("--run-dir", str(tmp_path / f"run-{count}"), "--save", str(tmp_path / "model.safetensors"))
        if device == "cuda":
            flags += ("--deterministic",)
        with monkeypatch.context() as patch:
            if optimizer is not None:
                patch.setattr("lm.training.build.eager", lambda _: optimizer)
            return jobs.build(monkeypatch, corpus, *jobs.MODES[mode], "--device", device, *where, *flags)

    return build


def adamw(params: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, foreach=True)


def fused_adamw(params: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2, fused=True)


def momentum(params: Any, lr: float, fused: bool) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.5, momentum=0.9, foreach=True)


OPTIMIZERS = {"fused-sgd": None, "momentum": momentum, "adamw": adamw, "fused-adamw": fused_adamw}


def backward(job: Training, batch: int) -> None:
    """Gradients of one batch, from a zero state."""
    bptt = job.args.bptt
    tokens, targets = get_batch(job.train_data, batch * bptt, bptt)
    with job.precision.forward():
        hidden = job.model.init_hidden(job.args.batch_size)
        loss, _ = next_word_loss(job.model, tokens, targets, hidden)
    job.precision.backward(loss)


def step(job: Training, batch: int, inject: tuple[str, float] | None = None, clip: float = 0.25) -> Any:
    """One whole training step; `inject` puts a value into the scaled gradient of a parameter."""
    job.model.train()
    job.model.zero_grad()
    backward(job, batch)
    if inject is not None:
        name, value = inject
        dict(job.model.named_parameters())[name].grad.view(-1)[3] = value
    return job.precision.step(clip)


def masters(job: Training) -> list[torch.Tensor]:
    return [p for group in job.precision.param_groups for p in group["params"]]


def optimizer_state(job: Training) -> list[torch.Tensor]:
    state = job.precision.state_dict()
    state = state.get("optimizer") or state["optimizer_state_dict"]
    return [v for s in state["state"].values() for v in s.values() if isinstance(v, torch.Tensor)]


def everything(job: Training) -> list[bytes]:
    return jobs.bits([*job.model.parameters(), *masters(job), *optimizer_state(job)])


@pytest.mark.parametrize("mode", jobs.MODES)
def test_a_step_reports_what_it_did(make, mode) -> None:
    job = make(mode)
    before = jobs.bits(masters(job))
    result = step(job, 0)
    assert [t.shape for t in result] == [torch.Size([])] * 3
    assert [t.dtype for t in result] == [torch.bool, torch.float32, torch.float32]
    assert {t.device.type for t in result} == {job.args.device}
    assert bool(result.applied)
    assert jobs.bits(masters(job)) != before
    assert {p.dtype for p in masters(job)} == {torch.float32}


@pytest.mark.parametrize("mode", jobs.MODES)
def test_the_norm_is_that_of_the_true_gradient(make, mode) -> None:
    """The fp32 model's gradient is the reference; half modes come as near as their products let them."""
    job, reference = make(mode, "--dropout", "0"), make("fp32", "--dropout", "0")
    result, expected = step(job, 0), step(reference, 0)
    tolerance = 1e-6 if "fp32" in mode else 3e-2 if "bf16" in mode else 3e-3
    assert float(result.grad_norm) == pytest.approx(float(expected.grad_norm), rel=tolerance)


@pytest.mark.parametrize("mode", jobs.MODES)
def test_the_update_is_clipped_to_max_norm_after_unscaling(make, mode) -> None:
    job = make(mode)
    before = [m.detach().clone() for m in masters(job)]
    result = step(job, 0, clip=0.01)
    assert float(result.grad_norm) > 0.01
    moved = math.sqrt(
        sum(float((a - b).detach().double().square().sum()) for a, b in zip(masters(job), before, strict=True))
    )
    assert moved == pytest.approx(job.args.lr * 0.01, rel=1e-3)


def overflows() -> Iterator[Any]:
    """Mode, parameter, value and optimizer, in all ways; quick is a third of them.

    As in a Latin square each mode meets every two of the other three in all their ways.
    """
    names, values = ("encoder.weight", "rnn.weight_hh_l1", "decoder.bias"), (math.inf, -math.inf, math.nan)
    every = product(jobs.MODES, enumerate(names), enumerate(values), enumerate(OPTIMIZERS))
    for mode, (i, name), (k, value), (n, optimizer) in every:
        yield pytest.param(mode, name, value, optimizer, marks=[] if (i + n) % 3 == k else [pytest.mark.slow])


@pytest.mark.parametrize(("mode", "name", "value", "optimizer"), list(overflows()))
def test_overflow_changes_no_bit_but_the_scale(make, mode, name, value, optimizer) -> None:
    job = make(mode, optimizer=OPTIMIZERS[optimizer])
    assert step(job, 0).applied
    before = everything(job)
    result = step(job, 1, inject=(name, value))
    assert not result.applied
    assert float(result.grad_norm) == math.inf, "the same in every mode, be it an inf or a nan that stands there"
    assert everything(job) == before
    after = step(job, 2)
    assert after.applied
    assert everything(job) != before
    assert all(m.isfinite().all() for m in masters(job))
    halved = 0.5 if mode in DYNAMIC_MODES else 1.0
    assert float(after.loss_scale) == float(result.loss_scale) * halved


@pytest.mark.parametrize("mode", [mode for mode in jobs.MODES if mode not in DYNAMIC_MODES])
def test_a_skipped_step_leaves_no_trace(make, mode) -> None:
    """With a static scale, a run that skipped one step ends in the bits of a run that never took it."""
    skipped, never = make(mode, "--dropout", "0"), make(mode, "--dropout", "0")
    step(skipped, 0), step(never, 0)
    step(skipped, 1, inject=("encoder.weight", math.nan))
    step(skipped, 2), step(never, 2)
    assert everything(skipped) == everything(never)


@pytest.mark.parametrize("mode", jobs.MODES)
def test_clipping_leaves_the_gradients_of_a_skipped_step_as_they_were(make, mode) -> None:
    """So that one can say which parameter overflowed; a norm of nan would spread to all of them."""
    job = make(mode)
    step(job, 0, inject=("rnn.weight_hh_l1", math.nan))
    bad = [n for n, p in job.model.named_parameters() if not p.grad.isfinite().all()]
    assert bad == ["rnn.weight_hh_l1"]


@pytest.mark.parametrize("mode", ["fp32", "fp16-optimizer-fp32", "amp-fp32", "amp-fp16-static"])
def test_a_gradient_that_overflows_when_unscaled_is_not_applied(make, mode) -> None:
    """3e38 is finite and 3e38 / 0.25 is not (pytorch#99640)."""
    job = make(mode, "--static-loss-scale", "0.25")
    before = everything(job)
    result = step(job, 0, inject=("decoder.bias", 3e38))
    assert not result.applied
    assert everything(job) == before


@pytest.mark.parametrize("mode", DYNAMIC_MODES)
def test_the_dynamic_scale_grows_after_its_window_and_falls_on_overflow(make, mode) -> None:
    job = make(mode, "--init-scale", "1024", "--scale-window", "3")
    overflow_at = {4, 5, 9}
    scales, expected, scale, good = [], [], 1024.0, 0
    for i in range(16):
        inject = ("decoder.bias", math.inf) if i in overflow_at else None
        result = step(job, i, inject=inject)
        assert bool(result.applied) == (i not in overflow_at)
        scales.append(float(result.loss_scale))
        expected.append(scale)
        good = 0 if i in overflow_at else good + 1
        if i in overflow_at:
            scale /= 2
        elif good == 3:
            scale, good = scale * 2, 0
    assert scales == expected


@pytest.mark.parametrize("mode", jobs.MODES)
def test_two_backwards_add_up(make, mode) -> None:
    """Gradients of two batches before one step, as against the plain sum from a loss scale of 1 in fp32."""
    job, reference = make(mode, "--dropout", "0"), make("fp32", "--dropout", "0")
    norms = []
    for each in (job, reference):
        each.model.zero_grad()
        backward(each, 0)
        backward(each, 1)
        norms.append(float(each.precision.step(0.25).grad_norm))
    assert norms[0] == pytest.approx(norms[1], rel=3e-2 if "bf16" in mode else 3e-3)


def through_a_file(state: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", jobs.MODES)
def test_save_and_load_go_on_exactly(make, mode, optimizer) -> None:
    flags = ("--dropout", "0", *jobs.if_dynamic(mode, "--scale-window", "4"))
    job = make(mode, *flags, optimizer=OPTIMIZERS[optimizer])
    for i in range(6):
        step(job, i, inject=("decoder.bias", math.inf) if i == 1 else None)
    saved = through_a_file({"model": job.model.state_dict(), "precision": job.precision.state_dict()})
    resumed = make(mode, *flags, "--seed", "7", optimizer=OPTIMIZERS[optimizer])
    resumed.model.load_state_dict(saved["model"])
    resumed.precision.load_state_dict(saved["precision"])
    assert everything(resumed) == everything(job)
    for i in range(6, 12):
        a, b = step(job, i), step(resumed, i)
        assert jobs.bits(list(a)) == jobs.bits(list(b))
        assert everything(resumed) == everything(job)


GPU = pytest.mark.cuda
KINDS_OF_DEVICE = [("cpu", "cpu"), pytest.param("cpu", "cuda", marks=GPU), pytest.param("cuda", "cpu", marks=GPU)]


@pytest.mark.parametrize(("device", "other"), KINDS_OF_DEVICE)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("mode", jobs.MODES)
def test_files_of_one_device_are_read_on_another(make, tmp_path, mode, optimizer, other) -> None:
    """All that a run goes on with but its random generators, and the model, with the same bits."""
    flags = ("--optimizer", optimizer, "--lr", "0.1")
    job, elsewhere = make(mode, *flags), make(mode, *flags, "--seed", "7", "--device", other)
    for i in range(3):
        step(job, i, inject=("decoder.bias", math.inf) if i == 1 else None)
    state = {"model": job.model.state_dict(), "precision": job.precision.state_dict()}
    save_tensors(tmp_path / "file", state, "a format")
    saved = load_tensors(tmp_path / "file", "a format")
    assert plain(saved) == plain(state)
    elsewhere.model.load_state_dict(saved["model"])
    elsewhere.precision.load_state_dict(saved["precision"])
    assert everything(elsewhere) == everything(job)
    assert plain(elsewhere.precision.state_dict()) == plain(state["precision"])
    assert {t.device.type for t in [*elsewhere.model.parameters(), *masters(elsewhere)]} == {other}
    assert step(elsewhere, 3).applied
    job.save_model()
    loaded, _ = load_model(job.args.save)
    saved = job.model.state_dict()  # under O2 of apex the masters
    assert jobs.bits(list(loaded.state_dict().values())) == jobs.bits([weight.float() for weight in saved.values()])


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_autocast_has_the_range_of_fp32(make, kind) -> None:
    """Gradients far below 2**-25, which fp16 flushes, reach all weights, in proportion: nothing runs in fp16 unasked.

    On a GPU torch's autocast would have recurrent layers in fp16 whatever it was asked for.
    """
    flags, tiny = ("--model", kind, "--nhead", "2", "--dropout", "0"), 2.0**-40
    gradients = {}
    for mode, scale in (("amp-bf16", 1.0), ("amp-bf16", tiny), ("amp-fp16-static", tiny)):
        job = make(mode, *flags, "--static-loss-scale", str(scale))
        job.model.train()
        backward(job, 0)
        gradients[mode, scale] = {name: p.grad.double() / scale for name, p in job.model.named_parameters()}
        assert mode == "amp-fp16-static" or job.dtypes["logits"] == job.dtypes.get("hidden", "bfloat16") == "bfloat16"
    assert not any(grad.any() for name, grad in gradients["amp-fp16-static", tiny].items() if name.startswith("rnn."))
    for name, expected in gradients["amp-bf16", 1.0].items():
        error = gradients["amp-bf16", tiny][name] - expected
        assert error.norm() < 2.0**-8 * expected.norm(), name


@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer", "fp16-optimizer-dynamic"])
def test_masters_win_over_half_weights_on_load(make, mode) -> None:
    job = make(mode)
    for i in range(3):
        step(job, i)
    state = through_a_file(job.precision.state_dict())
    fresh = make(mode, "--seed", "7")
    fresh.precision.load_state_dict(state)
    assert jobs.bits(masters(fresh)) == jobs.bits(masters(job))
    assert jobs.bits(list(fresh.model.parameters())) == jobs.bits(list(job.model.parameters()))


@pytest.mark.parametrize("mode", jobs.mostly_slow(jobs.MODES, "manual", "fp16-optimizer-dynamic", "amp-fp16"))
def test_a_state_saved_on_a_gpu_goes_on_where_it_is_loaded(make, mode) -> None:
    """`state_dict` of a loop that uses torch.save itself, read with map_location as torch says."""
    job, resumed = make(mode, "--dropout", "0"), make(mode, "--dropout", "0", "--seed", "7")
    for i in range(2):
        step(job, i)
    whole = torch_saved_on_gpu({"model": job.model.state_dict(), "precision": job.precision.state_dict()})
    assert b"cuda:0" in whole
    saved = torch.load(io.BytesIO(whole), map_location="cpu", weights_only=True)
    resumed.model.load_state_dict(saved["model"])
    resumed.precision.load_state_dict(saved["precision"])
    assert everything(resumed) == everything(job)
    assert jobs.bits(list(step(resumed, 2))) == jobs.bits(list(step(job, 2)))
    assert everything(resumed) == everything(job)


@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer", "fp16-optimizer-dynamic"])
def test_masters_keep_updates_that_the_half_weights_cannot_hold(make, mode) -> None:
    job = make(mode)
    for group in job.precision.param_groups:
        group["lr"] = 1e-6
    half, full = jobs.bits(list(job.model.parameters())), [m.detach().clone() for m in masters(job)]
    for i in range(5):
        step(job, i)
    assert sum(float((m - f).detach().abs().sum()) for m, f in zip(masters(job), full, strict=True)) > 0
    rounded = [m.half() for m in masters(job)]
    assert jobs.bits(rounded) == jobs.bits(list(job.model.parameters()))
    unchanged = sum(a == b for a, b in zip(half, jobs.bits(list(job.model.parameters())), strict=True))
    assert unchanged > 0


@pytest.mark.parametrize("mode", FP16_MODES)
def test_half_arithmetic_is_what_runs(make, mode) -> None:
    job = make(mode)
    assert job.dtypes["hidden"] == job.dtypes["logits"] == "float16"
    assert job.dtypes["loss"] == job.dtypes["master_weights"] == "float32"
    assert job.dtypes["gradients"] == ("float32" if mode.startswith("amp") or mode == "apex-o1" else "float16")


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN_TANH", "RNN_RELU"])
@pytest.mark.parametrize("mode", ["manual", "amp-fp16", "amp-bf16"])
def test_every_recurrent_layer_keeps_a_half_state(make, mode, kind) -> None:
    """Under CPU autocast a GRU given an fp32 state would return fp32."""
    half = "bfloat16" if "bf16" in mode else "float16"
    assert make(mode, "--model", kind).dtypes["hidden"] == half


@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer", "amp-fp16-static"])
def test_the_loss_is_scaled_in_fp32(make, monkeypatch, mode) -> None:
    """10.4 x 8192 is inf in fp16."""
    job = make(mode, "--static-loss-scale", "8192")
    scaled = []
    monkeypatch.setattr(torch.autograd, "backward", lambda loss, *args, **options: scaled.append(loss))
    loss = torch.tensor(10.4, device=job.args.device, requires_grad=True).half()
    job.precision.backward(loss)
    assert scaled[0].dtype == torch.float32
    assert float(scaled[0].detach()) == float(loss.detach()) * 8192


@pytest.mark.parametrize("mode", ["fp32", "manual"])
def test_evaluation_and_checkpoint_take_no_memory_that_they_need_not(make, mode) -> None:
    job = make(mode)
    step(job, 0)
    evaluate(job.model, job.precision, job.valid_data, job.args.bptt, 1)
    assert [p.grad for p in job.model.parameters()] == [None] * len(list(job.model.parameters()))
    saved = job.precision.state_dict()["masters"]
    assert [m.data_ptr() for m in saved] == [m.data_ptr() for m in masters(job)]


def test_evaluation_keeps_no_tensor_of_a_batch(make) -> None:
    job, counts = make("fp32"), []
    evaluate(job.model, job.precision, job.valid_data, 2, 5, lambda: counts.append(jobs.count_tensors()))
    assert counts[1:] == counts[1:2] * 4


def test_a_loss_scale_comes_from_the_state() -> None:
    weight = torch.nn.Parameter(torch.ones(1))
    saved, loaded = (MasterWeights([weight], torch.optim.SGD([weight], lr=1.0), scale) for scale in (8.0, 2.0))
    loaded.load_state_dict(saved.state_dict())
    loaded.backward(weight.sum())
    assert weight.grad is not None
    assert (weight.grad.item(), loaded.step(math.inf).loss_scale.item(), weight.item()) == (8.0, 8.0, 0.0)
