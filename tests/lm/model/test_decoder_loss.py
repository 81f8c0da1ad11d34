"""The decoder and its loss in slices, against the same in two lines of torch."""

import functools
import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

import jobs
from lm.model import decoder_loss as module
from lm.model import kernels
from lm.model.decoder_loss import constant_weights, decoder_loss, logits_of, plain_decoder_loss
from lm.model.foresight import KEPT, foretold, saw

ROWS, SIZE, VOCABULARY = 23, 12, 40


@functools.cache
def drawn(dtype: torch.dtype, rows: int) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(0)
    shapes = ((rows, SIZE), (VOCABULARY, SIZE), (VOCABULARY,))
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes], torch.randint(VOCABULARY, (rows,))


def operands(dtype: torch.dtype, rows: int = ROWS) -> tuple[list[Tensor], Tensor]:
    """The same tensors at each call, since the gradient of a loss is foretold for its weight; without gradients."""
    inputs, targets = drawn(dtype, rows)
    for x in inputs:
        x.grad = None
    return inputs, targets


def real_operands(dtype: torch.dtype, device: str) -> tuple[list[Tensor], Tensor]:
    """Those of a default step on WikiText-2, whose rows take other kernels of a GPU than those of up to 1,024."""
    torch.manual_seed(0)
    rows, size, vocabulary = 700, 200, 33_280
    drawn = torch.randn(rows, size), torch.rand(vocabulary, size) / 5 - 0.1, torch.zeros(vocabulary)
    inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
    return inputs, torch.randint(vocabulary, (rows,)).to(device)


def loss_and_grads(
    function: Any,
    dtype: torch.dtype,
    autocast: torch.dtype | None,
    scale: float = 1.0,
    given: tuple[list[Tensor], Tensor] | None = None,
) -> list[Tensor]:
    inputs, targets = given or operands(dtype)
    with torch.autocast(targets.device.type, autocast) if autocast else nullcontext():
        loss = function(*inputs, targets)
    assert loss.dtype == torch.float32
    (loss * scale).backward()
    return [loss, *(x.grad for x in inputs)]


@pytest.fixture(autouse=True)
def nothing_seen(monkeypatch) -> None:
    monkeypatch.setattr("lm.model.foresight._seen", {})


@pytest.fixture(params=[1, 7, ROWS, 10_000], ids="{}-rows".format)
def slices(request, monkeypatch) -> None:
    monkeypatch.setattr(module, "CACHED_BYTES", request.param * VOCABULARY * 4)


@pytest.fixture(params=["fp32", "fp16-without-instructions"])
def dtype(request, monkeypatch) -> torch.dtype:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: False)
    return torch.float32 if request.param == "fp32" else torch.float16


DTYPES = [
    (torch.float32, None),
    (torch.bfloat16, None),
    (torch.float16, None),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]


@pytest.mark.usefixtures("slices")
@pytest.mark.parametrize("scale", [1.0, 1024.0, 1000.0, 2.0**30])
@pytest.mark.parametrize(("dtype", "autocast"), DTYPES)
@pytest.mark.parametrize("instructions", [False, True])
def test_equals_plain_torch_in_every_bit(monkeypatch, instructions, dtype, autocast, scale) -> None:
    """Where the gradient of the loss was foretold wrongly, was not foretold, and was foretold rightly."""
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: instructions)
    plain = loss_and_grads(plain_decoder_loss, dtype, autocast, scale)
    for _ in range(2):
        loss_and_grads(decoder_loss, dtype, autocast, scale * 3)
    for case in ("wrongly", "not", "rightly"):
        ours = loss_and_grads(decoder_loss, dtype, autocast, scale)
        assert [x.dtype for x in ours] == [x.dtype for x in plain]
        assert jobs.bits(ours) == jobs.bits(plain), case


@pytest.mark.parametrize("value", [0.0, math.inf, math.nan, 2.0**-149])
def test_a_special_scale_gives_the_bits_of_plain_torch_at_every_repetition(dtype, value) -> None:
    for scale in (value, value, value, -value, -value, -value, 1.0):
        ours, plain = (loss_and_grads(f, dtype, None, scale) for f in (decoder_loss, plain_decoder_loss))
        assert jobs.bits(ours) == jobs.bits(plain), scale


def test_a_loss_without_backward_pass_and_one_of_another_shape_disturb_no_foretold_gradient(dtype) -> None:
    inputs, targets = operands(dtype)
    for _ in range(3):
        decoder_loss(*inputs, targets)
        few = loss_and_grads(decoder_loss, dtype, None, 0.25, operands(dtype, 9))
        assert jobs.bits(few) == jobs.bits(loss_and_grads(plain_decoder_loss, dtype, None, 0.25, operands(dtype, 9)))
        ours, plain = (loss_and_grads(f, dtype, None, 0.75) for f in (decoder_loss, plain_decoder_loss))
        assert jobs.bits(ours) == jobs.bits(plain)


def gradient_was_there(given: tuple[list[Tensor], Tensor], scale: float) -> bool:
    """Whether the backward pass found the gradient of the logits in their memory: what the loss is fast by on a CPU."""
    inputs, targets = given
    loss = decoder_loss(*inputs, targets)
    logits = logits_of(loss)
    before = logits.clone()
    (loss * scale).backward()
    return torch.equal(before, logits)


def test_the_forward_pass_takes_the_gradient_of_the_logits_once_it_came_twice(dtype) -> None:
    found = [gradient_was_there(operands(dtype), scale) for scale in (1.0, 1.0, 1.0, 2.0, 2.0, 2.0)]
    assert found == [False, False, True, False, False, True]


def test_two_models_in_turn_have_loss_scales_of_their_own(dtype) -> None:
    inputs, targets = operands(dtype)
    one, other = (inputs, targets), ([x.detach().clone().requires_grad_() for x in inputs], targets)
    found = [gradient_was_there(given, scale) for _ in range(3) for given, scale in ((one, 1.0), (other, 4.0))]
    assert found == [False, False, False, False, True, True]


TOLD: dict[str, tuple[list[float], float | None]] = {
    "nothing": ([], None),
    "once": ([2.0], None),
    "twice": ([2.0, 2.0], 2.0),
    "twice, long ago": ([2.0, 2.0, 3.0], None),
    "another twice": ([2.0, 2.0, 3.0, 3.0], 3.0),
    "in turn": ([2.0, 3.0, 2.0, 3.0], None),
    "inf": ([math.inf, math.inf], math.inf),
    "nan, which equals nothing": ([math.nan, math.nan], None),
    "0.0, which equals -0.0": ([0.0, 0.0], None),
}


@pytest.mark.parametrize("case", TOLD)
def test_foretold_is_what_came_twice_in_a_row(case) -> None:
    gradients, expected = TOLD[case]
    for gradient in gradients:
        saw("shape", gradient)
        saw("other shape", 5.0)
    assert foretold("shape") == expected


def test_the_shapes_seen_last_are_remembered() -> None:
    for shape in range(100):
        for _ in range(2):
            saw("often", 1.0)
            saw(shape, 1.0)
    assert foretold("often") == 1.0
    assert [shape for shape in range(100) if foretold(shape)] == [*range(101 - KEPT, 100)]


@pytest.mark.parametrize("dtypes", jobs.mostly_slow(DTYPES, DTYPES[0]), ids=str)
def test_equals_plain_torch_at_the_real_size(device, dtypes) -> None:
    """In every bit; but a GPU may sum a softmax over half logits in another order than one over their fp32 copy."""
    dtype, autocast = dtypes
    ours, plain = (
        loss_and_grads(f, dtype, autocast, 2.0**14, real_operands(dtype, device))
        for f in (decoder_loss, plain_decoder_loss)
    )
    assert [(x.dtype, x.device.type) for x in ours] == [(x.dtype, device) for x in plain]
    half = autocast or dtype
    if device == "cpu" or half is torch.float32:
        assert jobs.bits(ours) == jobs.bits(plain)
        return
    torch.testing.assert_close(ours[0], plain[0], rtol=1e-6, atol=0.0)
    for mine, its in zip(ours[1:], plain[1:], strict=True):
        assert (mine.double() - its.double()).norm() < torch.finfo(half).eps * its.double().norm()


@pytest.mark.parametrize("instructions", [False, True])
@pytest.mark.parametrize(("scale", "what"), [(2.0**-14, Tensor.count_nonzero), (2.0**22, lambda x: x.isfinite().sum())])
def test_the_loss_scale_keeps_its_meaning(monkeypatch, instructions, scale, what) -> None:
    """fp16 flushes to 0 and overflows to inf where plain torch does at this loss scale."""
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: instructions)
    ours, plain = (loss_and_grads(f, torch.float16, None, scale) for f in (decoder_loss, plain_decoder_loss))
    assert 0 < what(plain[2]) < plain[2].numel()
    assert [what(x) for x in ours[1:]] == [what(x) for x in plain[1:]]


def test_two_losses_before_their_backward_do_not_disturb_each_other(dtype) -> None:
    for _ in range(2):  # from then on the gradient is foretold
        loss_and_grads(decoder_loss, dtype, None)
    inputs, targets = operands(dtype)
    first, second = decoder_loss(*inputs, targets), decoder_loss(*inputs, targets.flip(0))
    (first + second).backward()
    sums = [x.grad.clone() for x in inputs]
    for x in inputs:
        x.grad = None
    (plain_decoder_loss(*inputs, targets) + plain_decoder_loss(*inputs, targets.flip(0))).backward()
    for x, total in zip(inputs, sums, strict=True):
        torch.testing.assert_close(total, x.grad)


def test_in_evaluation(dtype) -> None:
    inputs, targets = operands(dtype)
    with torch.no_grad(), constant_weights():
        losses = [decoder_loss(*inputs, targets) for _ in range(2)]
    with torch.no_grad():
        inputs[1].mul_(2)
        losses.append(decoder_loss(*inputs, targets))
        plain = plain_decoder_loss(*inputs, targets)
        inputs[1].div_(2)
    assert not any(loss.requires_grad for loss in losses)
    for loss in losses[:2]:
        assert torch.equal(loss, plain_decoder_loss(*inputs, targets))
    assert torch.equal(losses[2], plain)


@pytest.mark.parametrize("times_before", [1, 2])  # so that the gradient is foretold in the second case
def test_a_loss_that_is_kept_keeps_no_logits_and_no_copy_of_a_weight(dtype, times_before) -> None:
    inputs, targets = operands(dtype)
    for _ in range(times_before):
        decoder_loss(*inputs, targets).backward()
    before = jobs.count_tensors()
    loss = decoder_loss(*inputs, targets)
    loss.backward()
    assert (ROWS, VOCABULARY) not in [x.shape for x in jobs.live_tensors()]
    assert jobs.count_tensors() == before + 1  # the loss
    assert loss.grad_fn is not None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def memory() -> list[int]:
    """Where the logits that come next will be."""
    return [storage.data_ptr() for storage in module._unused]


@pytest.mark.parametrize(
    ("dtype", "instructions"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)]
)
def test_memory_of_logits_is_used_again_for_others_that_fit(monkeypatch, dtype, instructions) -> None:
    monkeypatch.setattr(kernels, "cpu_multiplies", lambda _: instructions)
    first = loss_and_grads(decoder_loss, torch.float32, None)
    kept = memory()
    assert len(kept) == 1
    with torch.no_grad():
        inputs, targets = operands(dtype)
        half = ROWS // 2
        assert torch.equal(
            decoder_loss(inputs[0][:half], *inputs[1:], targets[:half]),
            plain_decoder_loss(inputs[0][:half], *inputs[1:], targets[:half]),
        )
    assert memory() == kept
    for ours, again in zip(first, loss_and_grads(decoder_loss, torch.float32, None), strict=True):
        assert torch.equal(ours, again)
    assert memory() == kept


def test_logits_that_do_not_fit_get_memory_of_their_own(monkeypatch) -> None:
    small = torch.zeros(ROWS * VOCABULARY - 1)
    monkeypatch.setattr(module, "_unused", [small.untyped_storage()])
    both = (loss_and_grads(function, torch.float32, None) for function in (decoder_loss, plain_decoder_loss))
    for ours, plain in zip(*both, strict=True):
        assert torch.equal(ours, plain)
    assert [storage.nbytes() for storage in module._unused] == [4 * ROWS * VOCABULARY]
    assert small.untyped_storage().nbytes() == 4 * (ROWS * VOCABULARY - 1)


def test_logits_that_were_asked_for_are_not_written_over(dtype) -> None:
    inputs, targets = operands(dtype)
    loss = decoder_loss(*inputs, targets)
    gradient = logits_of(loss)
    loss.backward()
    before = gradient.clone()
    loss_and_grads(decoder_loss, dtype, None, 1024.0)
    assert torch.equal(gradient, before)


@pytest.mark.parametrize("times_before", [0, 2])  # so that the gradient is foretold in the second case
def test_a_second_backward_pass_is_refused_even_where_the_graph_was_kept(times_before) -> None:
    inputs, targets = operands(torch.float32)
    for _ in range(times_before):
        decoder_loss(*inputs, targets).backward()
    loss = decoder_loss(*inputs, targets)
    loss.backward(retain_graph=True)
    decoder_loss(*inputs, targets).backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
