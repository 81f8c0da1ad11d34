"""The decoder and its loss as one operation, whose fp32 numbers never leave the cache.

At 700 x 33,280 logits every pass over them goes through memory, and an fp32 tensor of that shape is 93 MB. Here the
logits are kept once, in the dtype of the product (as log probabilities where that is fp32). What is done to them in
fp32 is done to a few rows at a time, and their gradient overwrites them. Forward and backward of this part against
`plain_decoder_loss`, on two cores of an AMD Zen 4 with other programs running: 1.1 to 1.3 times as fast in fp32, 1.9 in
bfloat16; 1.3 to 1.5 and 2.1 where memory was kept too. That was with slices of 126 rows in a buffer of their own; with
7, fp32 ones in their place, it is 1.12 to 1.16 times as fast again in fp32, and the same in half, on one core.

The operations on a row are those of `plain_decoder_loss` in the same order, so the results are equal in every bit. But
on a CPU without instructions for the half dtype, the fp32 sums behind the decoder's gradient are taken slice by slice.

On a CPU the memory of the logits stays for the next ones. Freed, it would be the hole that the C library cuts small
tensors from, and the next logits would need new memory: 1,006 MiB after 300 steps in fp32, where it is 663 with this.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, UntypedStorage
from torch.autograd.function import once_differentiable

from lm.kernels import compute_dtype, half_through_fp32, linear

SLICE_BYTES = 1 << 24
"""Of a slice of fp32 logits that is multiplied: 126 rows of 33,280. Less makes products slower, more takes memory."""

CACHED_BYTES = 1 << 20
"""Of a slice of fp32 logits that is only read and written, on a CPU: 7 rows of 33,280, which its L2 cache holds."""

_unused: list[UntypedStorage] = []
"""The memory of the last logits on a CPU, unless somebody still has them; one at most."""


def plain_decoder_loss(input: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """What `decoder_loss` computes, as one would write it."""
    return F.cross_entropy(linear(input, weight, bias).float(), targets)


def decoder_loss(input: Tensor, weight: Tensor, bias: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of the logits `input @ weight.T + bias`, in nats a word.

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
    logits = _new_logits(len(input), len(weight), dtype, input.device)
    loss: Tensor = _DecoderLoss.apply(  # type: ignore[no-untyped-call]
        input.to(dtype), weight.to(dtype), bias.to(dtype), targets, logits, half_through_fp32(weight)
    )
    if not loss.requires_grad:  # so no backward pass will need them
        _keep_memory(logits)
    return loss


def logits_of(loss: Tensor) -> Tensor:
    """The logits behind `loss`, which `decoder_loss` returned; its backward pass makes them their own gradient.

    In `compute_dtype` of the weight (where that is fp32, log probabilities until then); shape (rows, vocabulary). They
    are the caller's from now on: no later loss takes their memory.
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
    """Autocast has no hold on what writes to `out=`, so all of it runs in the dtypes that stand here."""

    @staticmethod
    def forward(
        ctx: Any, input: Tensor, weight: Tensor, bias: Tensor, targets: Tensor, logits: Tensor, through_fp32: bool
    ) -> Tensor:
        if through_fp32:
            _multiply_through_fp32(input, weight, bias, logits)
        else:
            torch.addmm(bias, input, weight.t(), out=logits)
        log_p_of_targets = torch.empty((len(input), 1), dtype=torch.float32, device=input.device)
        fp32 = _fp32_rows(_cached_rows(logits), logits)
        for rows in _slices(logits, len(fp32)):
            log_p = _log_softmax(logits[rows], fp32)
            torch.gather(log_p, 1, targets[rows, None], out=log_p_of_targets[rows])
        # As a saved tensor: an attribute would live as long as somebody keeps the loss.
        ctx.save_for_backward(input, weight, targets, logits)
        ctx.through_fp32, ctx.keep_memory = through_fp32, True
        return F.nll_loss(log_p_of_targets, torch.zeros_like(targets))  # the mean, summed in the order of the plain one

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, targets, logits = ctx.saved_tensors
        grad_of_log_p = -grad / len(targets)
        fp32 = _fp32_rows(_cached_rows(logits), logits)
        one_hot = torch.zeros_like(fp32)
        for rows in _slices(logits, len(fp32)):
            part, at_target = logits[rows], targets[rows, None]
            log_p = part if part.dtype is torch.float32 else _log_softmax(part, fp32)
            selected = one_hot[: len(part)].scatter_(1, at_target, grad_of_log_p.expand_as(at_target))
            grad_of_logits = torch._log_softmax_backward_data(selected, log_p, 1, torch.float32, out=log_p)
            if grad_of_logits is not part:
                part.copy_(grad_of_logits)
            selected.scatter_(1, at_target, 0.0)
        grads = _products_through_fp32 if ctx.through_fp32 else _products
        result = *grads(logits, input, weight), logits.sum(0), None, None, None
        if ctx.keep_memory:
            _keep_memory(logits)
        return result


def _multiply_through_fp32(input: Tensor, weight: Tensor, bias: Tensor, logits: Tensor) -> None:
    wide_input, wide_weight, wide_bias = input.float(), weight.float(), bias.float()
    fp32 = _fp32_rows(_rows(SLICE_BYTES, logits), logits)
    for rows in _slices(logits, len(fp32)):
        logits[rows] = torch.addmm(wide_bias, wide_input[rows], wide_weight.t(), out=fp32[: len(logits[rows])])


def _products(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of the input and of the weight, from that of the logits."""
    return torch.mm(grad, weight), torch.mm(grad.t(), input)


def _products_through_fp32(grad: Tensor, input: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    wide_input, wide_weight = input.float(), weight.float()
    grad_input, grad_weight = torch.empty_like(wide_input), torch.zeros_like(wide_weight)
    fp32 = _fp32_rows(_rows(SLICE_BYTES, grad), grad)
    for rows in _slices(grad, len(fp32)):
        part = fp32[: len(grad[rows])].copy_(grad[rows])
        torch.mm(part, wide_weight, out=grad_input[rows])
        grad_weight.addmm_(part.t(), wide_input[rows])
    return grad_input.to(grad.dtype), grad_weight.to(grad.dtype)


def _log_softmax(logits: Tensor, fp32: Tensor) -> Tensor:
    """Of fp32 logits in their place, of others in rows of `fp32`."""
    wide = logits if logits.dtype is torch.float32 else fp32[: len(logits)].copy_(logits)
    return torch._log_softmax(wide, 1, False, out=wide)


def _rows(size: int, logits: Tensor) -> int:
    """How many rows of fp32 logits take `size` bytes: from 1 to all."""
    return min(len(logits), max(1, size // (4 * logits.size(1))))


def _cached_rows(logits: Tensor) -> int:
    return _rows(CACHED_BYTES if logits.device.type == "cpu" else SLICE_BYTES, logits)


def _fp32_rows(rows: int, logits: Tensor) -> Tensor:
    return logits.new_empty(rows, logits.size(1), dtype=torch.float32)


def _slices(logits: Tensor, size: int) -> Iterator[slice]:
    return (slice(start, start + size) for start in range(0, len(logits), size))
