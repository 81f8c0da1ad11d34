"""Model files: what --save writes and generate.py reads.

They may come from anyone; `roundoff.runs.tensor_file` says why.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.model.language_model import RNNModel
from roundoff.errors import BadFileError, UsageError, printable
from roundoff.runs.tensor_file import load_tensors, save_tensors

FORMAT = "roundoff model 2"


def save_model(path: Path, model: RNNModel, vocabulary: list[str]) -> None:
    """Write weights (in the model's dtype), model options and vocabulary: all that `generate.py` needs.

    The folder of `path` is made where it is missing.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"options": model.options, "vocabulary": vocabulary, "weights": model.state_dict()}
    save_tensors(path, content, FORMAT)


def load_model(path: Path) -> tuple[RNNModel, list[str]]:
    """Return the fp32 model on the CPU and its vocabulary, from a file that `save_model` wrote in any mode.

    Raises:
        UsageError: the file is missing, or not such a file, or contradicts itself.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "there is no such file"
        raise UsageError(f"--checkpoint {path}: {what}; train a model first, or give another")
    try:
        content = load_tensors(path, FORMAT)
    except BadFileError as error:
        raise UsageError(f"--checkpoint {path} cannot be read as a model file ({error}); give another") from None
    try:
        return model_of(content)
    except Exception as error:  # options of any type and value go into the model
        reason = printable(" ".join(str(error).split()), 160)  # torch writes its longest messages in several lines
        raise UsageError(f"--checkpoint {path} contradicts itself ({reason}); train it again") from None


def model_of(content: Any) -> tuple[RNNModel, list[str]]:
    """Return the fp32 model on the CPU and its vocabulary, of what a model file holds, which trusts nothing.

    Raises:
        Exception: `content` contradicts itself.
    """
    if not isinstance(content, dict):
        raise TypeError("it holds no model")
    options, vocabulary, weights = content["options"], content["vocabulary"], content["weights"]
    for name, weight in weights.items():
        _check_weight(name, weight)
    _check_options(options, vocabulary, len(weights))
    model = in_fp32(options, weights)
    for name, weight in model.state_dict().items():
        if not weight.isfinite().all():
            raise ValueError(f"{name} is not a tensor of finite numbers")
    return model, vocabulary


def in_fp32(options: dict[str, Any], weights: dict[str, Tensor]) -> RNNModel:
    """Return the model of these `RNNModel.options` on the CPU, with these weights, of any dtype, cast to fp32."""
    with torch.device("meta"):
        model = RNNModel(**options)
    # On the meta device first: names and shapes are checked before memory is taken for them.
    model.load_state_dict({name: weight.to("meta") for name, weight in weights.items()}, assign=True)
    model.load_state_dict({name: weight.detach().float().cpu() for name, weight in weights.items()}, assign=True)
    if options["tied"]:
        model.decoder.weight = model.encoder.weight
    return model


def _check_weight(name: str, weight: Any) -> None:
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise ValueError(f"{name} is not a tensor of finite numbers")


def _check_options(options: dict[str, Any], vocabulary: Any, weights: int) -> None:
    if not (isinstance(vocabulary, list) and all(isinstance(word, str) for word in vocabulary)):
        raise TypeError("the vocabulary is not a list of words")
    if not vocabulary:
        raise ValueError("the vocabulary is empty")
    "".join(vocabulary).encode()  # UnicodeEncodeError where a word cannot be written
    if not 0 <= options["ntokens"] - len(vocabulary) < 8:  # the decoder is padded to a multiple of 8
        raise ValueError(f"{len(vocabulary)} words for {options['ntokens']} scores")
    if not isinstance(options["tied"], bool):
        raise TypeError(f"tied is {options['tied']!r}")
    if 4 * options["nlayers"] > weights:  # checked here, since even an empty layer takes time to build
        raise ValueError(f"{weights} weights for {options['nlayers']} layers")
