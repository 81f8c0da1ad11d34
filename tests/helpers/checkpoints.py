"""What a checkpoint holds, in small, whether two such are the same in every bit, and what a model file holds.

And what a machine with GPUs makes of such things: a file with their tags, weights that are views of one storage.
"""

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from apex_compat.fp16_utils import FP16_Optimizer, prep_param_lists
from lm.model import model_file
from lm.model.language_model import next_word_loss
from programs import make_model
from roundoff.precision import Autocast, MasterWeights, Precision, WrappedOptimizer
from roundoff.runs.tensor_file import load_tensors

SETUPS = ("fp32", "manual", "wrapped", "wrapped adamw", "amp")


def content(setup: str) -> dict[str, Any]:
    """Two steps into a run: model, precision with masters and optimizer, generators, hidden state and counts."""
    model = make_model()
    precision: Precision
    if setup in ("manual", "wrapped", "wrapped adamw"):
        model.half()
    parameters = list(model.parameters())
    if setup == "manual":
        parameters, masters = prep_param_lists(model)
        precision = MasterWeights(parameters, torch.optim.SGD(masters, lr=0.1, momentum=0.9), 128.0)
    elif setup == "fp32":
        precision = MasterWeights(parameters, torch.optim.SGD(parameters, lr=0.1))
    elif setup == "amp":
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
        precision = Autocast(torch.optim.AdamW(parameters, lr=0.1), scaler, "cpu", torch.bfloat16)
    else:
        optimizer = torch.optim.AdamW(parameters) if "adamw" in setup else torch.optim.SGD(parameters, 0.1, 0.9)
        precision = WrappedOptimizer(FP16_Optimizer(optimizer, dynamic_loss_scale=True, verbose=False))
    tokens = torch.zeros((3, 2), dtype=torch.int64)
    for _ in range(2):
        model.zero_grad()
        with precision.forward():
            loss, hidden = next_word_loss(model, tokens, tokens.flatten(), model.init_hidden(2))
        precision.backward(loss)
        precision.step(0.25)
    return {
        "model": model.state_dict(),
        "precision": precision.state_dict(),
        "hidden": tuple(h.detach() for h in hidden),
        "generators": {"cpu": torch.get_rng_state(), "cuda": []},
        "flags": torch.tensor([True, False]),
        "position": {"epoch": 2, "batch": 5, 7: None},
        "best": (5.25, -1, 2**40, "wörd", False),
    }


def same(first: Any, second: Any) -> bool:
    """Equal in type, order and every bit, nan too; an OrderedDict is a dict."""
    if isinstance(first, dict) and isinstance(second, dict):
        return same(list(first.items()), list(second.items()))
    if type(first) is not type(second):
        return False
    if isinstance(first, Tensor):
        return (first.dtype, first.shape, bits(first)) == (second.dtype, second.shape, bits(second))
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return repr(first) == repr(second)


def saved_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a model file, in their dtype."""
    weights: dict[str, Tensor] = load_tensors(path, model_file.FORMAT)["weights"]
    return weights


def bits(tensor: Tensor) -> bytes:
    """The elements as they lie in memory, in order."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def torch_saved_on_gpu(content: Any, **options: Any) -> bytes:
    """The file that torch.save writes where all tensors of `content` are on `cuda:0`."""
    out = io.BytesIO()
    with mock.patch("torch.serialization.location_tag", return_value="cuda:0"):
        torch.save(content, out, **options)
    return out.getvalue()


def _side_by_side(weights: list[Tensor], padding: int) -> None:
    storage = weights[0].new_full((sum(w.numel() + padding for w in weights),), 7.0)
    parts = storage.split([n for w in weights for n in (w.numel(), padding)])[::2]
    for weight, part in zip(weights, parts, strict=True):
        weight.data = part.view_as(weight).copy_(weight.detach())


def _in_one(model: Any, padding: int = 0) -> None:
    _side_by_side(list(model.rnn.parameters()), padding)


def _one_a_layer(model: Any) -> None:
    for weights in model.rnn.all_weights:
        _side_by_side(weights, 0)


def _matrices_turned(model: Any) -> None:
    for weight in model.rnn.parameters():
        if weight.dim() == 2:
            weight.data = weight.detach().t().contiguous().t()


LAYOUTS: dict[str, Callable[[Any], None]] = {
    "one storage, as cuDNN has them": _in_one,
    "one storage, with gaps": lambda model: _in_one(model, padding=5),
    "one storage a layer": _one_a_layer,
    "column by column": _matrices_turned,
}
"""Places in memory where recurrent weights may lie -> what puts a model's there."""


def unique_bytes(tensors: dict[str, Tensor]) -> int:
    """Count the bytes of all tensors; those that share their memory count once."""
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors.values()}.values())


def data_bytes(whole: bytes) -> int:
    """Count the bytes that a tensor file takes for tensors, beside its header."""
    return len(whole) - 8 - int.from_bytes(whole[:8], "little")
