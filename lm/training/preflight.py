"""The preflight: a pass of the model before training, which shows whether and in which dtypes it runs here."""

import torch
from torch import nn

from lm.model.language_model import RNNModel, next_word_loss
from lm.options.options import Options
from roundoff import processes
from roundoff.device import device_name, random_state_kept
from roundoff.errors import UsageError
from roundoff.precision import Precision

DTYPES_OF_PRODUCTS = ("hidden", "logits")
"""Tensors that must have the dtype that was asked for: what comes out of the decoder, and of the recurrent layers."""


def try_once(model: RNNModel, precision: Precision, args: Options) -> dict[str, str]:
    """Run one tiny batch forward, backward and in evaluation, and return the dtypes that really ran.

    No weight, no gradient and no random state changes.

    Raises:
        UsageError: this device has no kernels for the dtype, or runs another one than was asked for.
    """
    with random_state_kept(args.device):
        try:
            dtypes = _dtypes(model, precision)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            if args.dtype == "float32":
                raise
            raise UsageError(
                f"{device_name(args.device)} cannot run {args.model} in {args.dtype} "
                f"({str(error).splitlines()[0][:120]}); try {_others(args)}"
            ) from None
    for name in DTYPES_OF_PRODUCTS:
        if dtypes.get(name, args.dtype) != args.dtype:
            raise UsageError(
                f"{args.model} was to run in {args.dtype}, but {device_name(args.device)} with torch "
                f"{torch.__version__} gives {name} in {dtypes[name]}; try {_others(args)}"
            )
    return dtypes


def _others(args: Options) -> str:
    half = "main_amp.py --dtype bfloat16" if args.dtype == "float16" else "main_amp.py --dtype float16"
    return f"{half}, or fp32 (main.py without --fp16)"


def settle(parallel_model: nn.Module, model: RNNModel, precision: Precision, args: Options) -> None:
    """Run a backward pass through DistributedDataParallel that counts for nothing; a single process needs none.

    DistributedDataParallel chooses the order of its sums by its first backward pass. With that pass behind it, a
    resumed run sums its first step in the same order as the run that it goes on with. No weight and no random state
    changes.
    """
    if processes.world_size() == 1:
        return
    tokens = torch.zeros((3, 2), dtype=torch.int64, device=model.decoder.weight.device)
    model.train()
    with random_state_kept(args.device), precision.forward():
        loss, _ = next_word_loss(parallel_model, tokens[:-1], tokens[1:].flatten(), model.init_hidden(2))
    loss.backward()  # type: ignore[no-untyped-call]
    model.zero_grad()


def _dtypes(model: RNNModel, precision: Precision) -> dict[str, str]:
    """Return the dtype of each kind of tensor, as it comes out of a tiny batch."""
    tokens = torch.zeros((3, 2), dtype=torch.int64, device=model.decoder.weight.device)
    model.train()
    # Past the hooks of a mode: O2 of apex casts what comes out of the model to fp32.
    with precision.forward():
        loss, hidden = model.forward(tokens[:-1], model.init_hidden(2), tokens[1:].flatten())
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    model.eval()
    with torch.no_grad(), precision.forward():
        logits, _ = model.forward(tokens, model.init_hidden(2))
    masters = [p for group in precision.param_groups for p in group["params"]]
    dtypes = {
        "weights": model.decoder.weight.dtype,
        "master_weights": masters[0].dtype,
        "logits": logits.dtype,
        "loss": loss.dtype,
        "gradients": gradients[0].dtype,
    }
    if len(hidden) > 0:  # a Transformer has none
        dtypes["hidden"] = hidden[0].dtype
    return {name: str(dtype).removeprefix("torch.") for name, dtype in dtypes.items()}
