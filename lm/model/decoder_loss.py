"""The decoder and its loss as one operation, which takes the softmax of a few rows at a time, while the cache has them.

At 700 x 33,280 logits every pass over them goes through memory, and an fp32 tensor of that shape is 93 MB. Here the
logits are kept once, in the dtype of the product. What is done to them in fp32 is done to a few rows at a time, and
their gradient overwrites them.

On a CPU the gradient of a slice is taken as soon as the slice has its softmax, in the forward pass, where
`lm.model.foresight` can tell what the loss will be multiplied by. The backward pass then has its products left to do.
If the loss was multiplied by something else, the backward pass computes the logits again, with the same bits, and
takes their gradient. Decoder and loss, forward and backward, at the default size against a second pass over the logits
in the backward pass: 1.02 to 1.04 times as fast in fp32, 1.2 in bfloat16, 1.1 in float16 (one thread of an Intel Xeon
with AMX, other programs running, processor time).

The operations on a row are those of `plain_decoder_loss` in the same order, so the results are equal in every bit. On a
CPU without instructions for the half dtype the logits and their gradient are fp32 too, and rounded to half in a slice:
so every product is one of fp32 matrices, as `linear` has it.

On a CPU the memory of the logits stays for the next ones. Freed, it would be the hole that the C library cuts small
tensors from, and the next logits would need new memory: 1,006 MiB after 300 steps in fp32, one thread, where it is 663
with this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.autograd.function import once_differentiable

from lm.model.foresight import foretold, saw
from lm.model.kernels import compute_dtype, half_through_fp32, linear, rounded, uncast

aten: Any = torch.ops.aten

CACHED_BYTES = 640 << 10
"""Bytes of a slice of fp32 logits for each thread of a CPU: 4 rows of 33,280. An L2 cache of 2 MiB holds three such."""

SLICE_BYTES = 1 << 28
"""Bytes of a slice elsewhere: all 700 rows of a default batch. By estimate a GPU's step is limited by its launches."""

MEAN, NO_INDEX = 1, -100  # arguments of torch.ops.aten.nll_loss_*

_unused: list[UntypedStorage] = []
"""The memory of the last logits on a CPU, unless somebody still has them; one at most."""

_casts: list[dict[int, tuple[Tensor, Tensor]]] = []
"""In a block of `constant_weights`: id of a weight -> the weight and its cast."""


def plain_decoder_loss(input: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Compute what `decoder_loss` does, as one would write it."""
    return F.cross_entropy(linear(input, weight, bias).float(), targets)


def decoder_loss(input: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Return the mean cross entropy of the logits `input @ weight.T + bias`, in nats a word.

    Logits are rounded to `compute_dtype(weight)` and cast up before the softmax: a sum over a vocabulary, and a mean
    over a batch, in fp16 lose the digits in which precision modes differ. The gradient of the logits is computed in
    fp32 from what the loss was multiplied by, and then rounded to that dtype once: what fp16 flushes or overflows at
    a loss scale, it does so here.

    Args:
        input: shape (rows, in_features).
        weight: shape (vocabulary, in_features).
        bias: shape (vocabulary,).
        targets: int64, shape (rows,).

    Returns:
        fp32, shape ().
    """
    dtype = compute_dtype(weight)
    half = dtype if half_through_fp32(weight) else None
    cast = partial(rounded, half=dtype) if half else partial(Tensor.to, dtype=dtype)
    operands = [cast(input), *(_cast_once(x, cast) for x in (weight, bias))]
    logits = _new_logits(len(input), len(weight), operands[0].dtype, input.device)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in operands)
    origin = _Origin(weight.data_ptr(), len(logits), logits.size(1), logits.dtype)
    guess = foretold(origin) if learns else None
    loss: Tensor = _DecoderLoss.apply(*operands, targets, logits, half, origin, guess)  # type: ignore[no-untyped-call]
    if not loss.requires_grad:  # so no backward pass will need them
        _keep_memory(logits)
    return loss


@contextmanager
def constant_weights() -> Iterator[None]:
    """Let `decoder_loss` cast each weight once in the block, where gradients are off. No weight may change in it."""
    _casts.append({})
    try:
        yield
    finally:
        _casts.pop()


def _cast_once(weight: Tensor, cast: Callable[[Tensor], Tensor]) -> Tensor:
    if not _casts or torch.is_grad_enabled():
        return cast(weight)
    if id(weight) not in _casts[-1]:
        _casts[-1][id(weight)] = weight, cast(weight)  # the weight too, so that its id stays its own
    return _casts[-1][id(weight)][1]


def logits_of(loss: Tensor) -> Tensor:
    """Return the tensor in which the backward pass of `loss` leaves the gradient of its logits.

    Args:
        loss: what `decoder_loss` returned.

    Returns:
        Shape (rows, vocabulary), in `compute_dtype` of the weight, or in fp32 with each number rounded to half where
        `half_through_fp32` says so. Before the backward pass it holds logits, log probabilities or a foretold
        gradient. It is the caller's from now on: no later loss takes its memory.
    """
    node: Any = loss.grad_fn
    node.keep_memory = False
    logits: Tensor = node.saved_tensors[-1]
    return logits


def _new_logits(rows: int, vocabulary: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Not initialised."""
    if _unused and device.type == "cpu":
        unused = _unused.pop()
        if unused.nbytes() >= rows * vocabulary * dtype.itemsize:
            return torch.empty(0, dtype=dtype).set_(unused, 0, (rows, vocabulary), (vocabulary, 1))
        del unused  # before there is more
    return torch.empty((rows, vocabulary), dtype=dtype, device=device)


def _keep_memory(logits: Tensor) -> None:
    if logits.device.type == "cpu":  # elsewhere torch keeps freed memory itself, by its size
        _unused[:] = [logits.untyped_storage()]


class _DecoderLoss(torch.autograd.Function):
    """Forward has `out=`, on which autocast has no hold; backward belongs outside of autocast, as torch says.

    O1 of apex would cast in both. Here all operands have their dtypes.
    """

    @staticmethod
    @uncast
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor,
        targets: Tensor,
        logits: Tensor,
        half: torch.dtype | None,
        origin: "_Origin",
        guess: float | None,
    ) -> Tensor:
        log_p_of_targets = torch.empty((len(input), 1), dtype=torch.float32, device=input.device)
        gradient = None if guess is None else _Gradient(logits, guess)
        slices = _log_probabilities(input, weight, bias, logits, half)
        columns = (torch.split(x, _at_once(logits)) for x in (targets[:, None], log_p_of_targets))
        for (part, log_p), words, log_p_of_words in zip(slices, *columns, strict=True):
            torch.gather(log_p, 1, words, out=log_p_of_words)
            if gradient is not None:
                gradient.put(part, log_p, words)
                _round(part, half)
        # The mean, summed in the order of the plain one.
        loss, count = aten.nll_loss_forward(log_p_of_targets, torch.zeros_like(targets), None, MEAN, NO_INDEX)
        # As saved tensors: attributes would live as long as somebody keeps the loss.
        ctx.save_for_backward(input, weight, bias, targets, count, logits)
        ctx.half, ctx.origin, ctx.guess, ctx.keep_memory = half, origin, guess, True
        return loss  # type: ignore[no-any-return]

    @staticmethod
    @uncast
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, targets, count, logits = ctx.saved_tensors
        if _is_right(ctx.guess, ctx.origin, grad, count):
            torch.autograd.graph.increment_version(logits)  # so that a second backward pass is refused here too
        else:
            if ctx.guess is not None:
                for _ in _log_probabilities(input, weight, bias, logits, ctx.half):
                    pass
            _overwrite_with_gradient(logits, grad, targets, count, ctx.half)
        grads = torch.mm(logits, weight), torch.mm(logits.t(), input), logits.sum(0)
        if ctx.keep_memory:
            _keep_memory(logits)
        return *grads, None, None, None, None, None


def _log_probabilities(
    input: Tensor, weight: Tensor, bias: Tensor, logits: Tensor, half: torch.dtype | None
) -> Iterator[tuple[Tensor, Tensor]]:
    """Compute `logits`, and yield each slice of them with its log probabilities, which the next ones overwrite.

    Those of fp32 logits are in the place of the logits, and stay there.
    """
    torch.addmm(bias, input, weight.t(), out=logits)  # the same bits at a second call, which backward may need
    wide = _wide_rows(logits)
    for part in torch.split(logits, _at_once(logits)):
        yield part, _log_softmax(_round(part, half), wide)


class _Origin(NamedTuple):
    """Tells losses apart by what they are multiplied by: a loss scale is of one model, and a part's weight of its rows.

    A weight elsewhere in memory is another model's. Where it is that of a model which is gone, a guess may be wrong.
    """

    weight: int
    rows: int
    vocabulary: int
    dtype: torch.dtype


def _is_right(guess: float | None, origin: _Origin, grad: Tensor, count: Tensor) -> bool:
    """Return whether logits hold their gradient already; remember what the guess should have been, for the next."""
    if grad.device.type != "cpu":  # to read a number there would be to wait
        return False
    found = float(-(grad / count))
    saw(origin, found)
    return found == guess


class _Gradient:
    """Puts the gradient of logits in their place, a slice at a time.

    Args:
        logits: all of them, shape (rows, vocabulary).
        value: the gradient of a target's log probability.
    """

    def __init__(self, logits: Tensor, value: float) -> None:
        self._zeros = logits.new_zeros(_at_once(logits), logits.size(1), dtype=torch.float32)
        self._value = value

    def put(self, logits: Tensor, log_p: Tensor, words: Tensor) -> None:
        """Overwrite a slice of `logits`, and `log_p` (fp32, shaped alike); `words` are its targets, shape (rows, 1)."""
        one_hot = self._zeros[: len(logits)].scatter_(1, words, self._value)
        _softmax_gradient(one_hot, log_p, logits)
        one_hot.scatter_(1, words, 0.0)  # zeros again, without a pass over them


def _overwrite_with_gradient(
    logits: Tensor, grad: Tensor, targets: Tensor, count: Tensor, half: torch.dtype | None
) -> None:
    """Put the gradient of all logits in their place, which has their log probabilities where it is fp32."""
    wide = _wide_rows(logits)
    selected = logits.new_empty(_at_once(logits), logits.size(1), dtype=torch.float32)
    for part, words in zip(*(torch.split(x, len(selected)) for x in (logits, targets)), strict=True):
        log_p = part if wide is None else _log_softmax(part, wide)
        one_hot = selected[: len(part)]
        aten.nll_loss_backward.grad_input(grad, log_p, words, None, MEAN, NO_INDEX, count, grad_input=one_hot)
        _softmax_gradient(one_hot, log_p, part)
        _round(part, half)


def _round(fp32: Tensor, half: torch.dtype | None) -> Tensor:
    """In place: each number to the nearest in `half`, if there is one to round to."""
    return fp32.copy_(fp32.to(half)) if half else fp32


def _log_softmax(logits: Tensor, wide: Tensor | None) -> Tensor:
    """Return the log probabilities of a slice: of fp32 logits in their place, of others in rows of `wide`."""
    if wide is None:
        return torch._log_softmax(logits, 1, False, out=logits)
    wide = wide[: len(logits)]
    if _casts_within(logits):
        return torch._log_softmax(logits, 1, True, out=wide)
    return torch._log_softmax(wide.copy_(logits), 1, False, out=wide)


def _softmax_gradient(grad: Tensor, log_p: Tensor, logits: Tensor) -> None:
    """Put the gradient of `logits` in their place, rounded to their dtype; `grad` (fp32) is that of `log_p`."""
    if _casts_within(logits):
        torch._log_softmax_backward_data(grad, log_p, 1, logits.dtype, out=logits)
        return
    wide = torch._log_softmax_backward_data(grad, log_p, 1, torch.float32, out=log_p)
    if wide is not logits:
        logits.copy_(wide)


def _casts_within(logits: Tensor) -> bool:
    """Return whether torch's softmax kernels cast up and down as they read and write: of float16 on CUDA alone."""
    return logits.is_cuda and logits.dtype is torch.float16


def _at_once(logits: Tensor) -> int:
    """Return how many rows a slice has: from one to all."""
    row = 4 * logits.size(1)
    size = torch.get_num_threads() * max(1, CACHED_BYTES // row) if logits.device.type == "cpu" else SLICE_BYTES // row
    return min(len(logits), max(1, size))


def _wide_rows(logits: Tensor) -> Tensor | None:
    """Return memory for a slice of half logits in fp32; None where logits are fp32 themselves."""
    if logits.dtype is torch.float32:
        return None
    return logits.new_empty(_at_once(logits), logits.size(1), dtype=torch.float32)
