"""Files given as --checkpoint that are none, or hostile: one line each, and nothing in them is executed."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import LAYOUTS, data_bytes, torch_saved_on_gpu, unique_bytes
from fuzzing import fuzz
from hostile import DAMAGES, PICKLES, sealed_tree
from jobs import bits
from lm.model.model_file import FORMAT, load_model, save_model
from lm.training.checkpoint import FORMAT as CHECKPOINT
from programs import WORDS, Programs, make_model
from roundoff.errors import UsageError
from roundoff.runs.tensor_file import save_tensors

COMMANDS = (("generate", "--words", "5"), ("probe", "--data", "corpus", "--checkpoint", "model.safetensors"))


def model_content(**replaced: Any) -> dict[str, Any]:
    """What `save_model` saves, with parts of it replaced."""
    model = make_model()
    return {"options": model.options, "vocabulary": WORDS, "weights": model.state_dict()} | replaced


def test_no_file_and_a_folder(programs: Programs) -> None:
    assert "--checkpoint model.safetensors: there is no such file" in programs.refuse("generate")
    error = programs.refuse("generate", "--checkpoint", "corpus")
    assert "--checkpoint corpus: corpus/config.json: there is no such file; give a run directory" in error


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command[0])
@pytest.mark.parametrize("name", PICKLES)
def test_a_file_that_would_run_code(programs: Programs, name: str, command: tuple[str, ...]) -> None:
    """`refuse` finds that no file has appeared, the canary least of all."""
    (programs.folder / "model.safetensors").write_bytes(PICKLES[name](programs.folder / "canary"))
    error = programs.refuse(*command)
    assert re.search("cannot be read as a model file .*(it is a pickle|no safetensors file)", error)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_of_an_older_version_from_a_gpu(programs: Programs, legacy: bool) -> None:
    """Its tensors are tagged `cuda:0`, which torch.load would not read here. Like any pickle it is not opened."""
    whole = torch_saved_on_gpu(model_content(), _use_new_zipfile_serialization=not legacy)
    (programs.folder / "model.safetensors").write_bytes(whole)
    error = programs.refuse("generate")
    assert re.search("cannot be read as a model file .*(it is a pickle|no safetensors file)", error)
    assert "cuda" not in error


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_whose_weights_lie_as_on_a_gpu(tmp_path: Path, layout: str, tied: bool, dtype: torch.dtype) -> None:
    """Its file has no more than the weights, and gives them back."""
    for kind in ("LSTM", "GRU", "RNN_TANH"):
        model, plain = make_model(kind, tied).to(dtype), make_model(kind, tied).to(dtype)
        LAYOUTS[layout](model)
        save_model(tmp_path / "file", model, WORDS)
        assert data_bytes((tmp_path / "file").read_bytes()) == unique_bytes(plain.state_dict())
        read, _ = load_model(tmp_path / "file")
        assert bits(list(read.state_dict().values())) == bits([w.float() for w in plain.state_dict().values()])
        assert (read.encoder.weight is read.decoder.weight) == tied


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file(saved: Programs, name: str) -> None:
    path = saved.folder / "model.safetensors"
    path.write_bytes(DAMAGES[name].make(path.read_bytes()))
    error = saved.refuse("generate")
    assert error.startswith("error: --checkpoint model.safetensors cannot be read as a model file (")
    assert re.search(DAMAGES[name].said, error)


def test_a_file_of_another_format(programs: Programs) -> None:
    save_tensors(programs.folder / "model.safetensors", model_content(), CHECKPOINT)
    assert f"of format '{CHECKPOINT}', not '{FORMAT}'" in programs.refuse("generate")


@pytest.mark.parametrize("content", [None, 7, [], {}, torch.zeros(3), make_model().state_dict()], ids=range(6))
def test_what_is_no_model(programs: Programs, content: Any) -> None:
    save_tensors(programs.folder / "model.safetensors", content, FORMAT)
    assert "contradicts itself" in programs.refuse("generate")


CONTRADICTIONS: dict[str, list[tuple[Any, str]]] = {
    "weights": [(None, "'weights'"), ([], "no attribute")],
    "weights/decoder.weight": [
        (torch.zeros(16, 9), "size mismatch"),
        (torch.zeros(24, 8), "size mismatch"),
        (torch.full((16, 8), 1e300, dtype=torch.float64), "decoder.weight is not a tensor of finite numbers"),
    ],
    "weights/encoder.weight": [
        (torch.zeros(16), "size mismatch"),
        (torch.full((16, 8), torch.inf), "encoder.weight is not a tensor of finite numbers"),
    ],
    "weights/rnn.weight_ih_l0": [(None, "Missing key")],
    "weights/surplus": [(torch.zeros(3), "Unexpected key")],
    "weights/\x1b[2J\n": [(torch.zeros(3), r"Unexpected key.*\\x1b\[2J")],
    "weights/decoder.bias": [
        ("text", "decoder.bias is not a tensor"),
        (torch.full((16,), torch.nan), "finite numbers"),
        (torch.zeros(16, dtype=torch.int64), "finite numbers"),
    ],
    "vocabulary": [
        (None, "'vocabulary'"),
        ([], "the vocabulary is empty"),
        ("the cat", "not a list of words"),
        ([1, 2, 3], "not a list of words"),
        ([str(i) for i in range(17)], "17 words for 16 scores"),
        ([str(i) for i in range(8)], "8 words for 16 scores"),  # padding is less than 8
    ],
    "options": [(None, "'options'"), ([], "contradicts itself")],
    "options/kind": [("TRANSFORMER", "allowed are"), (None, "kind"), ({"LSTM": 1}, "allowed are")],
    "options/nlayers": [
        (1, "Unexpected key"),
        (0, "num_layers"),
        (100, "11 weights for 100 layers"),
        (10**9, "11 weights for 1000000000 layers"),
        (1.5, "contradicts itself"),
        ("2", "contradicts itself"),
    ],
    "options/nhid": [(10**6, "size mismatch"), (10**12, "contradicts itself"), (2**62, "contradicts itself")],
    "options/ntokens": [(24, "10 words for 24 scores"), ("16", "contradicts itself")],
    "options/emsize": [(-8, "contradicts itself")],
    "options/dropout": [(3.0, "contradicts itself")],
    "options/tied": [(None, "'tied'"), ("no", "tied is 'no'")],
    "options/surplus": [(1, "surplus")],
}
"""Part of a model file -> what is there instead (None: nothing), and the words of the refusal."""


@pytest.mark.parametrize("part", CONTRADICTIONS)
def test_a_model_file_that_contradicts_itself(programs: Programs, part: str) -> None:
    for value, said in CONTRADICTIONS[part]:
        content = place = model_content()
        *path, last = part.split("/", 1)
        for step in path:
            place[step] = place = dict(place[step])
        place[last] = value
        if value is None:
            del place[last]
        save_tensors(programs.folder / "model.safetensors", content, FORMAT)
        error = programs.refuse("generate", "--words", "5")
        assert "--checkpoint model.safetensors contradicts itself" in error
        assert re.search(said, error), (value, error)
        assert error[:-1].isprintable()


def test_words_that_cannot_be_written(programs: Programs) -> None:
    tree = {"options": make_model().options, "vocabulary": ["\ud800"] * 10, "weights": {}}
    (programs.folder / "model.safetensors").write_bytes(sealed_tree(tree, FORMAT))
    assert "can't encode" in programs.refuse("generate")


def test_weights_whose_product_is_infinite(programs: Programs) -> None:
    weights = make_model().state_dict()
    weights |= {"decoder.weight": torch.full((16, 8), 3e38), "decoder.bias": torch.full((16,), 3e38)}
    save_tensors(programs.folder / "model.safetensors", model_content(weights=weights), FORMAT)
    assert "scores of word 1 are not finite" in programs.refuse("generate", "--words", "5")


def test_a_spoiled_file_differs_in_the_spoiled_part_only(programs: Programs) -> None:
    content = model_content(options=make_model().options | {"dropout": 0.3})
    save_tensors(programs.folder / "model.safetensors", content, FORMAT)
    assert programs.run("generate", "--words", "5").code == 0
    assert len((programs.folder / "generated.txt").read_text(encoding="utf-8").split()) == 5


def test_one_tensor_passes_for_few_only(tmp_path: Path) -> None:
    """A small file of one half tensor under a thousand names does not become a thousand fp32 weights."""
    names = [f"rnn.{part}_l{i}" for i in range(250) for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")]
    options = make_model().options | {"nlayers": 250, "nhid": 256, "emsize": 256}
    tree = {"options": options, "vocabulary": WORDS, "weights": {name: {"$tensor": "a"} for name in names}}
    (tmp_path / "file").write_bytes(sealed_tree(tree, FORMAT, {"a": torch.zeros(1024, 256, dtype=torch.float16)}))
    with pytest.raises(UsageError, match="more than 4 places"):
        load_model(tmp_path / "file")


def test_a_changed_model_is_a_model_or_refused(tmp_path: Path) -> None:
    values = st.sampled_from(
        [None, -1, 0, 1, 2, 7, 1.5, True, "LSTM", "GRU", [], {}, "x" * 300, 2**62, torch.zeros(16)]
    )
    words = st.lists(st.text(max_size=3), max_size=17)

    @fuzz(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        whole = model_content()
        part = data.draw(st.sampled_from(["options", "weights", "vocabulary", "top"]))
        place: dict[str, Any] = whole if part in ("top", "vocabulary") else dict(whole[part])
        name = part if part == "vocabulary" else data.draw(st.sampled_from(sorted(place)))
        place[name] = data.draw(words if part == "vocabulary" else values)
        save_tensors(tmp_path / "file", whole if place is whole else whole | {part: place}, FORMAT)
        with suppress(UsageError):
            model, vocabulary = load_model(tmp_path / "file")
            "".join(vocabulary).encode()
            model(torch.zeros((1, 1), dtype=torch.int64), model.init_hidden(1))

    check()
