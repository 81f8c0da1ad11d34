"""Model files: what --save writes and generate.py reads, without running anything from them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lm.errors import UsageError
from lm.files import write_atomically
from lm.model import RNNModel

FORMAT = "lm-precision model 1"


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

    Nothing in the file is executed: it is read with `weights_only=True`.

    Raises:
        UsageError: the file is missing, or not such a file, or contradicts itself.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "there is no such file"
        raise UsageError(f"--checkpoint {path}: {what}; train a model first, or give another")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader of a hostile or torn file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UsageError(f"--checkpoint {path} cannot be read as a model file ({reason[:120]})") from None
    return _build_model(path, content)


def _build_model(path: Path, content: Any) -> tuple[RNNModel, list[str]]:
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise UsageError(f"--checkpoint {path} is no model file of this project; give one that --save wrote")
    try:
        options, vocabulary = content["options"], content["vocabulary"]
        weights = {name: _checked_weight(name, weight) for name, weight in content["weights"].items()}
        _check_options(options, vocabulary, len(weights))
        with torch.device("meta"):  # shapes are checked before memory is taken for them
            model = RNNModel(**options)
        model.load_state_dict(weights, assign=True)
    except Exception as error:  # as above
        reason = str(error).replace("\n", " ").replace("\t", "")
        raise UsageError(f"--checkpoint {path} contradicts itself ({reason[:160]}); train it again") from None
    if options["tied"]:
        model.decoder.weight = model.encoder.weight
    return model, vocabulary


def _checked_weight(name: str, weight: Tensor) -> Tensor:
    if weight.layout != torch.strided or not weight.is_floating_point() or not weight.isfinite().all():
        raise ValueError(f"{name} is not a dense tensor of finite numbers")
    return weight.float()


def _check_options(options: dict[str, Any], vocabulary: Any, weights: int) -> None:
    if not (isinstance(vocabulary, list) and all(isinstance(word, str) for word in vocabulary)):
        raise TypeError("the vocabulary is not a list of words")
    if not 0 <= options["ntokens"] - len(vocabulary) < 8:  # the decoder is padded to a multiple of 8
        raise ValueError(f"{len(vocabulary)} words for {options['ntokens']} scores")
    if not isinstance(options["tied"], bool):
        raise TypeError(f"tied is {options['tied']!r}")
    if options["nlayers"] > weights:  # checked here, since even an empty layer takes time to build
        raise ValueError(f"{weights} weights for {options['nlayers']} layers")
