"""A whole step on a GPU of fake tensors: devices, dtypes, waits and launches, on a machine that has none.

What a real GPU computes is for test_cuda.py. That a step waits for nothing test_device_waits.py shows in another way.
"""

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.utils._pytree import tree_leaves

import jobs
from fake_cuda import CUDA, WHY_NOT, Recorder, fake_cuda
from lm.model.decoder_loss import decoder_loss
from lm.options.modes import DEFAULT_MODES, MODES
from lm.training import loop
from lm.training.loop import Training
from roundoff.errors import UsageError
from roundoff.precision import MasterWeights, StepResult

pytestmark = pytest.mark.skipif(WHY_NOT != "", reason=WHY_NOT)

KINDS = {"LSTM": (), "GRU": (), "RNN_TANH": ("--optimizer", "adamw"), "RNN_RELU": (), "Transformer": ()}
"""The layers, each with flags that they are run with."""
QUICK = [
    *(("LSTM", mode) for mode in DEFAULT_MODES),
    *(("GRU", "amp-bf16"), ("RNN_TANH", "amp-fp16"), ("RNN_TANH", "manual"), ("Transformer", "fp16-optimizer")),
]
every_job = pytest.mark.parametrize(
    ("kind", "mode"),
    [
        pytest.param(kind, mode, marks=() if (kind, mode) in QUICK else pytest.mark.slow)
        for kind in KINDS
        for mode in MODES
    ],
)
STEP = ("try_once", "step")


class Ran(NamedTuple):
    """What three steps, a flush and an evaluation leave."""

    recorder: Recorder
    job: Training
    results: list[StepResult]
    state: dict[str, Any]
    """of the precision: its optimizer's, its masters"""


def run(monkeypatch: pytest.MonkeyPatch, folder: Path, mode: str, *flags: str, steps: int = 3) -> Ran:
    """Build the job of a mode through its own script, and take all of it but the files."""
    flags = ("--device", str(CUDA), "--run-dir", str(folder / "run"), "--save", str(folder / "model"), *flags)
    corpus = jobs.write_corpus(folder / "few lines", lines=40)
    results: list[StepResult] = []
    with fake_cuda(monkeypatch) as recorder, monkeypatch.context() as patch:
        try_once = loop.try_once

        def tried(*args: Any) -> Any:
            with recorder.in_phase("try_once"):
                return try_once(*args)

        patch.setattr(loop, "try_once", tried)
        with recorder.in_phase("start"):
            job = jobs.build(monkeypatch, corpus, *jobs.MODES[mode], *flags)
        take = job.precision.step
        patch.setattr(job.precision, "step", lambda max_norm: results.append(take(max_norm)) or results[-1])
        job.model.train()
        with recorder.in_phase("step"):
            for i in range(steps):
                job.train_step(i * job.args.bptt)
        gradients = [p.grad for p in job.model.parameters()]
        with recorder.in_phase("flush"):
            assert len(job.records.flush()) == steps
        with recorder.in_phase("evaluation"):
            assert isinstance(job.evaluate(job.valid_data), float)
        with recorder.in_phase("state"):
            state = job.precision.state_dict() | {"gradients": gradients}
        job.records.close()
    return Ran(recorder, job, results, state)


def of_hidden(ran: Ran) -> tuple[Tensor, ...]:
    """The state of the layers after the last step."""
    hidden = ran.job.hidden
    assert hidden is not None
    return hidden if isinstance(hidden, tuple) else (hidden,)


# --- what a step must be


def check_devices(ran: Ran) -> None:
    """All tensors that an operator takes or returns are on the GPU; not even a scalar, which torch would take, is not.

    At the start the model and the text go there; at the end of an evaluation its loss comes back.
    """
    recorder = ran.recorder
    assert {(o.phase, o.name, seen) for o in recorder.of(*STEP) for seen in o.off_gpu} == set()
    in_evaluation = [o.name for o in recorder.of("evaluation") if o.off_gpu]
    assert set(in_evaluation) == {
        "aten.lift_fresh",  # how many words each batch has
        "aten._to_copy",  # the losses, to the CPU, and to float64
        *("aten.mul.Tensor", "aten.sum", "aten.div.Tensor", "aten._local_scalar_dense"),
    }
    assert len(in_evaluation) == 8
    assert {o.name for o in recorder.operations if len(o.devices) > 1} == {"aten._to_copy"}
    left = [*ran.job.model.parameters(), *of_hidden(ran), *tree_leaves((ran.results, ran.state))]
    assert {x.device for x in left if isinstance(x, Tensor)} == {CUDA}


def check_waits(ran: Ran) -> None:
    """The host waits once for the loss of an evaluation, for the rows where they are flushed, and for nothing else."""
    waits = ran.recorder.waits
    assert [wait for wait in waits if wait[1] not in ("start", "flush", "state")] == [("aten._to_copy", "evaluation")]
    assert "flush" in {phase for _, phase in waits}
    assert {name for name, phase in waits if phase == "start"} == {"aten._to_copy"}


def check_dtypes(ran: Ran, mode: str) -> None:
    """Weights, masters, gradients, logits, loss and what a step reports are of the dtype that the docs say."""
    half = MODES[mode].dtype
    weights = "float32" if MODES[mode].script == "main_amp" else half
    expected = {
        "weights": weights,
        "master_weights": "float32",
        "gradients": weights,
        "logits": half,
        "loss": "float32",
    }
    assert {name: dtype for name, dtype in ran.job.dtypes.items() if name != "hidden"} == expected
    assert {p.dtype for p in ran.job.model.parameters()} == {getattr(torch, weights)}
    assert {grad.dtype for grad in ran.state["gradients"]} == {getattr(torch, weights)}
    masters = [p for group in ran.job.precision.param_groups for p in group["params"]]
    assert {p.dtype for p in masters} == {p.grad.dtype for p in masters if p.grad is not None} | {torch.float32}
    assert {x.dtype for x in tree_leaves(ran.state) if isinstance(x, Tensor)} <= {torch.float32, getattr(torch, half)}
    for result in ran.results:
        assert [x.dtype for x in result] == [torch.bool, torch.float32, torch.float32]
        assert {x.shape for x in result} == {()}


def check_recurrent(ran: Ran, mode: str) -> None:
    """What cuDNN is given is of the mode's dtype, and so is the state that comes back.

    Its weights lie side by side, else it copies them at every call, and warns. It is left no dropout: it would draw the
    masks from a state of its own, which no checkpoint holds, and a resumed run would be another one.
    """
    half = MODES[mode].dtype
    calls = ran.recorder.recurrent
    assert {call.phase for call in calls} == {*STEP, "evaluation"}
    assert {dtype for call in calls for dtype in call.dtypes} == {getattr(torch, half)}
    assert {(call.is_flat, call.dropout) for call in calls} == {(True, 0.0)}
    assert {h.dtype for h in of_hidden(ran)} == {getattr(torch, half)}
    assert ran.job.dtypes["hidden"] == half


@every_job
def test_a_whole_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, kind: str, mode: str) -> None:
    ran = run(monkeypatch, tmp_path, mode, "--model", kind, *KINDS[kind])
    assert {o.phase for o in ran.recorder.operations} >= {"start", *STEP, "flush", "evaluation"}
    check_devices(ran)
    check_waits(ran)
    check_dtypes(ran, mode)
    if kind == "Transformer":
        assert of_hidden(ran) == ()
    else:
        check_recurrent(ran, mode)


FLAGS = [("--tied", "--tf32"), ("--deterministic",), ("--optimizer", "adamw"), ("--dropout", "0"), ("--nlayers", "1")]


@pytest.mark.parametrize("flags", jobs.mostly_slow(FLAGS, FLAGS[0]), ids=" ".join)
def test_a_whole_step_with_other_flags(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: tuple[str, ...]) -> None:
    ran = run(monkeypatch, tmp_path, "fp16-optimizer-dynamic", *flags)
    check_devices(ran)
    check_waits(ran)
    check_dtypes(ran, "fp16-optimizer-dynamic")
    check_recurrent(ran, "fp16-optimizer-dynamic")


# --- launches


def launches_of_a_loss(monkeypatch: pytest.MonkeyPatch, loss_of: Callable[..., Tensor], dtype: torch.dtype) -> int:
    """Kernels of forward and backward at the default job's size; views and memory are none."""
    rows, vocabulary, width = 700, 33_280, 200
    with fake_cuda(monkeypatch) as recorder:
        shapes = ((rows, width), (vocabulary, width), (vocabulary,))
        operands = [torch.zeros(shape, dtype=dtype, device=CUDA, requires_grad=True) for shape in shapes]
        targets, scale = torch.zeros(rows, dtype=torch.int64, device=CUDA), torch.ones((), device=CUDA)
        with recorder.in_phase("loss"):
            loss = loss_of(*operands, targets)
            grads = torch.autograd.grad(loss, operands, scale)
    assert (loss.dtype, loss.device) == (torch.float32, CUDA)
    assert [(grad.dtype, grad.shape) for grad in grads] == [(dtype, torch.Size(shape)) for shape in shapes]
    assert recorder.waits == []
    return len(recorder.launches("loss"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_decoder_loss_launches_few_kernels(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """A step of 200 units is bound by launches."""
    assert launches_of_a_loss(monkeypatch, decoder_loss, dtype) <= 18


# --- each check can fail


Meddle = Callable[[pytest.MonkeyPatch], None]


def instead(change: Callable[[Tensor, Any, Tensor], tuple[Tensor, Any]]) -> Meddle:
    """What lets `change` of (loss, hidden, tokens) be the loss and the state of each step."""

    def meddle(patch: pytest.MonkeyPatch) -> None:
        real = loop.next_word_loss

        def next_word_loss(model: nn.Module, tokens: Tensor, *others: Any) -> tuple[Tensor, Any]:
            return change(*real(model, tokens, *others), tokens)

        patch.setattr(loop, "next_word_loss", next_word_loss)

    return meddle


def beside(do: Callable[[Tensor, Tensor], object]) -> Meddle:
    """What does something with the detached loss and the tokens of each step, which changes nothing."""

    def change(loss: Tensor, hidden: Any, tokens: Tensor) -> tuple[Tensor, Any]:
        do(loss.detach(), tokens)
        return loss, hidden

    return instead(change)


def reporting(change: Callable[[StepResult], StepResult]) -> Meddle:
    """What changes what a step reports."""

    def meddle(patch: pytest.MonkeyPatch) -> None:
        real = MasterWeights.step
        patch.setattr(MasterWeights, "step", lambda self, max_norm: change(real(self, max_norm)))

    return meddle


MUTANTS: dict[str, tuple[Meddle, Callable[..., None]]] = {
    "a tensor on the CPU": (beside(lambda *_: torch.ones(3) + 1), check_devices),
    "a scalar on the CPU": (beside(lambda loss, _: loss + torch.ones(())), check_devices),
    "there and back": (instead(lambda loss, h, _: (loss, tuple(x.cpu().to(CUDA) for x in h))), check_devices),
    "to the CPU": (beside(lambda loss, _: loss.cpu()), check_waits),
    "to the GPU": (beside(lambda *_: torch.ones(3).to(CUDA)), check_waits),
    "copied to the CPU": (beside(lambda loss, _: torch.ones(()).copy_(loss)), check_waits),
    "item": (beside(lambda loss, _: loss.item()), check_waits),
    "float": (beside(lambda loss, _: float(loss)), check_waits),
    "if": (beside(lambda loss, _: 1 if loss > 0 else 2), check_waits),
    "a mask": (beside(lambda _, tokens: tokens[tokens > 0]), check_waits),
    "nonzero": (beside(lambda _, tokens: tokens.nonzero()), check_waits),
    "equal": (beside(lambda _, tokens: tokens.equal(tokens)), check_waits),
    "unique": (beside(lambda _, tokens: tokens.unique()), check_waits),
    "a norm in float64": (reporting(lambda r: r._replace(grad_norm=r.grad_norm.double())), check_dtypes),
    "a scale in half": (reporting(lambda r: r._replace(loss_scale=r.loss_scale.half())), check_dtypes),
    "a verdict in fp32": (reporting(lambda r: r._replace(applied=r.applied.float())), check_dtypes),
}
"""What is wrong with a step -> how it gets there, and the check that must find it."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_step_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """By its check; or by the fake tensors themselves, where the numbers would decide on a shape or on the way."""
    meddle, check = MUTANTS[name]
    meddle(monkeypatch)
    with pytest.raises((AssertionError, DynamicOutputShapeException, DataDependentOutputException)):
        check(run(monkeypatch, tmp_path, "manual", steps=1), *(["manual"] if check is check_dtypes else []))


def test_another_dtype_than_the_modes_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ran = run(monkeypatch, tmp_path, "fp32")
    for check in (check_dtypes, check_recurrent):
        check(ran, "fp32")
        for mode in ("manual", "amp-fp16", "amp-bf16"):
            with pytest.raises(AssertionError):
                check(ran, mode)


RECURRENT_MUTANTS: dict[str, tuple[str, str, Any]] = {
    "all layers at once": ("manual", "LSTM.forward", nn.LSTM.forward),
    "autocast left on": ("amp-bf16", "LSTM.forward", nn.LSTM.forward),
    "weights here and there": ("manual", "LSTM.flatten_parameters", lambda self: None),
    "casts one by one": ("amp-bf16", "cast_together", lambda weights, dtype: [w.to(dtype) for w in weights]),
}
"""What is wrong with recurrent layers -> a mode, and what of lm.model.recurrent is replaced by what."""


@pytest.mark.parametrize("name", RECURRENT_MUTANTS)
def test_a_wrong_recurrent_layer_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """By its check, or, where it runs in another dtype, by the preflight."""
    mode, place, wrong = RECURRENT_MUTANTS[name]
    monkeypatch.setattr(f"lm.model.recurrent.{place}", wrong)
    with pytest.raises((AssertionError, UsageError)):
        check_recurrent(run(monkeypatch, tmp_path, mode, steps=1), mode)


def test_more_launches_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    once = launches_of_a_loss(monkeypatch, decoder_loss, torch.float16)
    assert launches_of_a_loss(monkeypatch, lambda *x: decoder_loss(*x) + decoder_loss(*x), torch.float16) > 2 * once


@pytest.mark.parametrize("layers", [nn.LSTM, nn.GRU, nn.RNN], ids=lambda layers: layers.__name__)
def test_what_stands_in_for_cudnn_does_what_torch_does_there(monkeypatch: pytest.MonkeyPatch, layers: Any) -> None:
    """torch's own layers: float16 under autocast in bfloat16, dropout by cuDNN, and weights side by side or not."""
    with fake_cuda(monkeypatch) as recorder:
        rnn, input = layers(3, 4, 2, dropout=0.5).to(CUDA), torch.zeros(5, 2, 3, device=CUDA)
        rnn(input)
        with torch.autocast("cuda", torch.bfloat16):
            output, _ = rnn(input)
        with torch.no_grad():
            rnn.weight_hh_l0.set_(rnn.weight_hh_l0.clone())
        rnn(input)[0].sum().backward()
    assert output.dtype == torch.float16
    calls = [(call.dtypes, call.dropout, call.layers, call.is_flat) for call in recorder.recurrent]
    fp32, fp16 = frozenset([torch.float32]), frozenset([torch.float16])
    assert calls == [(fp32, 0.5, 2, True), (fp16, 0.5, 2, False), (fp32, 0.5, 2, False)]
    assert {(p.grad.shape, p.grad.device) for p in rnn.parameters()} == {(p.shape, CUDA) for p in rnn.parameters()}


def test_nothing_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.lstm, torch.cuda.is_available(), torch.backends.cuda.matmul.fp32_precision
    with suppress(ZeroDivisionError), fake_cuda(monkeypatch):
        assert torch.cuda.is_available()
        assert torch.zeros(3, device=CUDA).is_cuda
        raise ZeroDivisionError
    assert (torch.lstm, torch.cuda.is_available(), torch.backends.cuda.matmul.fp32_precision) == before
    layers, input = nn.LSTM(2, 2), torch.ones(1, 1, 2)
    layers(input)[0].sum().backward()
    assert type(layers.weight_hh_l0.grad) is Tensor
    with pytest.raises((RuntimeError, AssertionError)):
        torch.zeros(3, device=CUDA)
