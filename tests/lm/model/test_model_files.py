"""Files given as --checkpoint that are none, or hostile: one line each, and nothing in them is executed."""

import pickle
from pathlib import Path

import pytest
import torch

from lm.model.model_file import FORMAT
from programs import WORDS, make_model


class Executed:
    """Unpickling this makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("legacy", [False, True], ids=["torch's zip", "torch's old format"])
@pytest.mark.parametrize("inside", [False, True], ids=["all of it", "among the options"])
def test_a_file_that_would_run_code(programs, inside, legacy):
    marker = programs.folder / "executed"
    content = Executed(marker)
    if inside:
        content = {"format": FORMAT, "options": {"kind": Executed(marker)}, "vocabulary": WORDS, "weights": {}}
    torch.save(content, programs.folder / "model.safetensors", _use_new_zipfile_serialization=not legacy)
    assert "--checkpoint model.safetensors" in programs.refuse("generate")
    assert not marker.exists()
    torch.load(programs.folder / "model.safetensors", weights_only=False)
    assert marker.exists()  # the file is as bad as it is meant to be


def test_a_bare_pickle_that_would_run_code(programs):
    marker = programs.folder / "executed"
    (programs.folder / "model.safetensors").write_bytes(pickle.dumps(Executed(marker)))
    assert "--checkpoint model.safetensors" in programs.refuse("generate")
    assert not marker.exists()


def test_no_file_and_a_folder(programs):
    assert "--checkpoint model.safetensors" in programs.refuse("generate")
    error = programs.refuse("generate", "--checkpoint", "corpus")
    assert "--checkpoint corpus" in error
    assert "no such file" not in error  # there is one, of another kind


@pytest.mark.parametrize(
    "content", [b"", b"\0", b"not a model\n" * 100, b"PK\x03\x04" + bytes(200), b"\x80\x02]q\x00."], ids=range(5)
)
def test_a_file_of_another_kind(programs, content):
    (programs.folder / "model.safetensors").write_bytes(content)
    assert "--checkpoint model.safetensors" in programs.refuse("generate")


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 0.99])
def test_a_file_cut_short(saved, share):
    whole = (saved.folder / "model.safetensors").read_bytes()
    (saved.folder / "model.safetensors").write_bytes(whole[: int(share * len(whole))])
    assert "--checkpoint model.safetensors" in saved.refuse("generate")


@pytest.mark.parametrize(
    "content",
    [
        None,
        7,
        [],
        {},
        torch.zeros(3),
        make_model().state_dict(),
        {"format": "roundoff model 2"},
        {"format": [FORMAT]},
    ],
    ids=["None", "number", "list", "empty", "tensor", "weights alone", "format of the future", "strange format"],
)
def test_a_torch_file_that_is_no_model(programs, content):
    torch.save(content, programs.folder / "model.safetensors")
    assert "no model file" in programs.refuse("generate")


def test_a_model_saved_whole(programs):
    """As other programs save theirs; to read it would be to run it."""
    torch.save(make_model(), programs.folder / "model.safetensors")
    assert "--checkpoint model.safetensors" in programs.refuse("generate")


def spoiled(part: str, value: object) -> dict:
    """A model file's content with one part of it replaced; None takes it away."""
    model = make_model()
    content = {"format": FORMAT, "options": model.options, "vocabulary": WORDS, "weights": model.state_dict()}
    *path, last = part.split("/")
    place = content
    for step in path:
        place = place[step]
    place[last] = value
    if value is None:
        del place[last]
    return content


@pytest.mark.parametrize(
    ("part", "value"),
    [
        ("weights/decoder.weight", torch.zeros(16, 9)),
        ("weights/decoder.weight", torch.zeros(24, 8)),
        ("weights/encoder.weight", torch.zeros(16)),
        ("weights/rnn.weight_ih_l0", None),
        ("weights/surplus", torch.zeros(3)),
        ("weights/decoder.bias", "text"),
        ("weights/decoder.bias", torch.full((16,), torch.nan)),
        ("weights/encoder.weight", torch.full((16, 8), torch.inf)),
        ("weights/decoder.bias", torch.zeros(16).to_sparse()),
        ("weights/decoder.bias", torch.zeros(16, dtype=torch.complex64)),
        ("weights", None),
        ("weights", []),
        ("vocabulary", None),
        ("vocabulary", []),
        ("vocabulary", "the cat"),
        ("vocabulary", [1, 2, 3]),
        ("vocabulary", [str(i) for i in range(17)]),
        ("vocabulary", [str(i) for i in range(8)]),  # padding is less than 8
        ("options", None),
        ("options", []),
        ("options/kind", "TRANSFORMER"),
        ("options/kind", None),
        ("options/nlayers", 1),
        ("options/nlayers", 0),
        ("options/nlayers", 100),
        ("options/nhid", 10**12),
        ("options/ntokens", 24),
        ("options/ntokens", "16"),
        ("options/emsize", -8),
        ("options/dropout", 3.0),
        ("options/tied", None),
        ("options/tied", "no"),
        ("options/surplus", 1),
    ],
)
def test_a_model_file_that_contradicts_itself(programs, part, value):
    torch.save(spoiled(part, value), programs.folder / "model.safetensors")
    assert "--checkpoint model.safetensors" in programs.refuse("generate", "--words", "5")


def test_a_spoiled_file_differs_in_the_spoiled_part_only(programs):
    torch.save(spoiled("options/dropout", 0.3), programs.folder / "model.safetensors")
    assert programs.run("generate", "--words", "5").code == 0
    assert len((programs.folder / "generated.txt").read_text(encoding="utf-8").split()) == 5
