"""Model files: what --save writes and generate.py reads, without running anything from them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.model.language_model import RNNModel
from roundoff.errors import BadFileError, UsageError, printable
from roundoff.runs.files import write_atomically
from roundoff.runs.tensorfile import load_tensors

FORMAT = "roundoff model 1"


def save_model(path: Path, model: RNNModel, vocabulary: list[str]) -> None:
    """Write weights (in the model's dtype), model options and vocabulary: all that `generate.py` needs."""
    content = {
        "format": FORMAT,
        "options": model.options,
        "vocabulary": vocabulary,
        "weights": model.state_dict(),
    }
    write_atomically(path, lambda file: torch.save(content, file))


def load_model(path: Path) -> tuple[RNNModel, list[str]]:
    """The fp32 model on the CPU and its vocabulary, from a file that `save_model` wrote in any mode.

    Nothing in the file is executed; see `load_tensors`.

    Raises:
        UsageError: the file is missing, or not such a file, or contradicts itself.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "there is no such file"
        raise UsageError(f"--checkpoint {path}: {what}; train a model first, or give another")
    try:
        content = load_tensors(path)
    except BadFileError as error:
        raise UsageError(f"--checkpoint {path} cannot be read as a model file ({error}); give another") from None
    return _build_model(path, content)


def _build_model(path: Path, content: Any) -> tuple[RNNModel, list[str]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"--checkpoint {path} is no model file of this project; give one that --save wrote")
    try:
        options, vocabulary = content["options"], content["vocabulary"]
        weights = content["weights"]
        for name, weight in weights.items():
            _check_weight(name, weight)
        _check_options(options, vocabulary, len(weights))
        model = in_fp32(options, weights)
    except Exception as error:  # options of any type and value go into the model
        reason = printable(" ".join(str(error).split()), 160)  # torch writes its longest messages in several lines
        raise UsageError(f"--checkpoint {path} contradicts itself ({reason}); train it again") from None
    return model, vocabulary


def in_fp32(options: dict[str, Any], weights: dict[str, Tensor]) -> RNNModel:
    """The model of these `RNNModel.options` on the CPU, with these weights, of any dtype, cast to fp32."""
    with torch.device("meta"):  # shapes are checked before memory is taken for them
        model = RNNModel(**options)
    model.load_state_dict({name: weight.detach().float().cpu() for name, weight in weights.items()}, assign=True)
    if options["tied"]:
        model.decoder.weight = model.encoder.weight
    return model


def _check_weight(name: str, weight: Tensor) -> None:
    if not weight.is_floating_point() or not weight.float().isfinite().all():
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
    if options["nlayers"] > weights:  # checked here, since even an empty layer takes time to build
        raise ValueError(f"{weights} weights for {options['nlayers']} layers")
