"""--onnx-export: the trained model as a file for other runtimes, which onnxruntime has run before it is there."""

import importlib
from pathlib import Path

import torch
from torch import Tensor

from lm.model.language_model import Hidden, RNNModel
from lm.model.model_file import in_fp32
from roundoff.errors import RunError, UsageError, printable
from roundoff.program import own
from roundoff.runs.files import write_atomically
from roundoff.terminal import say

PACKAGES = ("onnx", "onnxruntime")
TOLERANCE = 1e-4
"""How far from the model's own numbers, relative to the largest, is not rounding: fp32 sums in another order differ by
2e-7 of it over 8 units, and by the square root of their number more."""


def check_onnx_export(path: Path, save: Path) -> None:
    """Raise UsageError if `export_onnx` could not write `path` at the end of the run whose model goes to `save`.

    Raises:
        UsageError: a package is not installed, or the file is that of --save.
    """
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise UsageError(
                f"--onnx-export without ONNX (no {error.name} here): pip install 'roundoff[onnx]', which a run "
                "needs that was started with the flag, or leave the flag out: --resume with the finished run and "
                "--onnx-export writes the file later"
            ) from None
    if path.resolve() == save.resolve():
        raise UsageError(f"--onnx-export and --save are both {save}; give each a file of its own")


def export_onnx(path: Path, model: RNNModel, vocabulary: list[str], words: int, save: Path) -> None:
    """Write `model` to `path` as ONNX, in fp32; see `lm.model.onnx_graph.build`.

    Its output for `words` words is checked first. `save` is where the model itself is, for the error.

    Raises:
        RunError: it cannot be built or written, or onnxruntime's output is not that of the model.
    """
    from lm.model.onnx_graph import OPSET, build

    try:
        model = in_fp32(model.options, model.state_dict()).eval()
        content = build(model, vocabulary).SerializeToString()
        difference = _difference(content, model, words)
        if not difference <= TOLERANCE:
            raise ValueError(f"onnxruntime's numbers differ from the model's own by {difference:.1e} of the largest")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: file.write(content))
    except Exception as error:  # whatever the packages raise: nothing of the run may be lost by it
        reason = (isinstance(error, OSError) and error.strerror) or printable(" ".join(str(error).split()), 160)
        message = (
            f"--onnx-export {path}: {reason or type(error).__name__}; all else of the run is there, its model in "
            f"{save}: to try again, --resume it with --onnx-export"
        )
        raise RunError(own(message)) from None
    say(f"| {path}: ONNX opset {OPSET}, fp32; onnxruntime is within {difference:.1e} of the model's largest numbers")


@torch.no_grad()
def _difference(content: bytes, model: RNNModel, words: int) -> float:
    """Return how far onnxruntime's logits and new state are from the model's own, over the largest of these numbers.

    It is that of two columns of `words` random words after a random state; nan where a number is not finite.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # what goes wrong comes as an exception too
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    random = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.decoder.out_features, (words, 2), generator=random)
    state = [torch.rand(like.shape, generator=random) * 2 - 1 for like in _tensors(model.init_hidden(2))]
    logits, new_state = model(tokens, state[0] if len(state) == 1 else tuple(state))
    expected = [logits, *_tensors(new_state)]
    names = [input.name for input in session.get_inputs()]
    found = session.run(None, {name: x.numpy() for name, x in zip(names, [tokens, *state], strict=True)})
    largest = max(float(x.abs().max()) for x in expected)
    differences = [(torch.from_numpy(a) - b).abs().max() for a, b in zip(found, expected, strict=True)]
    return float(torch.stack(differences).max()) / largest


def _tensors(hidden: Hidden) -> tuple[Tensor, ...]:
    return hidden if isinstance(hidden, tuple) else (hidden,)
