"""Tensor files give back what was saved, in bounded memory. All else is refused in one line, and not executed."""

import json
import math
import os
import pickle
import random
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from bounded import FORMAT, needs_bounds, read_bounded
from checkpoints import LAYOUTS, SETUPS, content, data_bytes, same, unique_bytes
from fuzzing import byte_changes, fuzz
from hostile import DAMAGES, PICKLES, TREES, sealed, sealed_tree
from programs import make_model
from roundoff.errors import BadFileError
from roundoff.program import exit_code
from roundoff.runs.tensor_file import load_tensors, save_tensors


def saved(path: Path, tree: Any) -> bytes:
    save_tensors(path, tree, FORMAT)
    return path.read_bytes()


def read(path: Path, whole: bytes) -> Any:
    """What is in the file; its BadFileError where it is refused."""
    path.write_bytes(whole)
    try:
        return load_tensors(path, FORMAT)
    except BadFileError as error:
        refusal = error
    assert re.fullmatch(r"[^\n]{5,150}", str(refusal))
    assert str(refusal).isprintable()
    return refusal


# --- what was saved comes back

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
DTYPES = [*FLOATS, torch.int64, torch.int32, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> Tensor:
    """Of any dtype, some without elements, some with strides of their own; the bits are any, nan too."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(DTYPES))
    content = random.Random(draw(st.integers(0, 99))).randbytes(math.prod(shape) * dtype.itemsize)
    tensor = torch.tensor([b & 1 if dtype == torch.bool else b for b in content], dtype=torch.uint8)
    tensor = tensor.view(dtype).view(shape)
    return tensor.mT if tensor.dim() > 1 and draw(st.booleans()) else tensor


plain = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.text(max_size=5)
keys = st.text("$a.'日\n\0", max_size=3) | st.integers(-3, 3) | st.sampled_from(["__metadata__", "$tensor", "$pairs"])
trees = st.recursive(
    plain | tensors(),
    lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=8,
)


@fuzz(150)
@given(trees)
def test_any_tree_comes_back(tmp_path: Path, tree: Any) -> None:
    whole = saved(tmp_path / "file", tree)
    assert same(load_tensors(tmp_path / "file", FORMAT), tree)
    assert saved(tmp_path / "file", tree) == whole  # equal trees make equal files
    assert all(isinstance(t, Tensor) for t in safetensors.torch.load_file(tmp_path / "file").values())


@pytest.mark.parametrize("setup", SETUPS)
def test_what_a_resume_needs_comes_back(tmp_path: Path, setup: str) -> None:
    """Model, masters, optimizer, loss scale and random generators of each precision mode."""
    whole = content(setup)
    saved(tmp_path / "file", whole)
    assert same(load_tensors(tmp_path / "file", FORMAT), whole)


def test_a_tensor_in_two_places_is_saved_once_and_shared_again(tmp_path: Path) -> None:
    untied = len(saved(tmp_path / "untied", make_model(tied=False).state_dict()))
    tied = len(saved(tmp_path / "tied", make_model(tied=True).state_dict()))
    assert untied - tied > 16 * 8 * 4 - 100
    state = load_tensors(tmp_path / "tied", FORMAT)
    assert state["encoder.weight"] is state["decoder.weight"]
    base = torch.arange(6.0)
    saved(tmp_path / "views", {"all": base, "front": base[:3], "back": base[3:], "table": base.view(2, 3)})
    views = load_tensors(tmp_path / "views", FORMAT)
    assert [views[name].flatten().tolist() for name in ("front", "back", "table")] == [
        [0, 1, 2], [3, 4, 5], [0, 1, 2, 3, 4, 5],
    ]  # fmt: skip


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_weights_that_are_views_take_no_more_than_weights(tmp_path: Path, layout: str, tied: bool) -> None:
    """A file with the storage behind each view would hold it as often as there are views."""
    model, plain = make_model(tied=tied), make_model(tied=tied).state_dict()
    LAYOUTS[layout](model)
    weights = model.state_dict()
    whole = saved(tmp_path / "file", {"model": weights, "best": dict(weights)})
    assert data_bytes(whole) == unique_bytes(plain) == unique_bytes(weights)
    read_back = load_tensors(tmp_path / "file", FORMAT)
    assert same(read_back["model"], dict(plain))
    assert same(read_back["best"], dict(plain))
    assert (read_back["model"]["encoder.weight"] is read_back["model"]["decoder.weight"]) == tied


def deep(levels: int, key: str | int) -> Any:
    """A number in so many mappings, the innermost of which has `key`."""
    tree: Any = {key: 1}
    for _ in range(levels - 1):
        tree = {"a": tree}
    return tree


NOT_READ: dict[str, Any] = {
    "a tensor in five places": [torch.ones(2)] * 5,
    "too deep": deep(21, "a"),
    "too deep by an int key": deep(20, 1),
    "an int of 65 bits": {"a": 2**63},
    "a key of 65 bits": {-(2**63) - 1: 1},
    "a lone surrogate": "\ud800",
    "a key with a lone surrogate": {"\udfff": torch.ones(2)},
    "a header of 16 MiB": "x" * 2**24,
}
"""Trees that the reader would refuse."""


def test_what_is_just_not_too_much_is_read(tmp_path: Path) -> None:
    shared = torch.ones(2)
    trees = [[shared] * 4, [torch.zeros(0)] * 9, deep(20, "a"), deep(19, 1), 2**63 - 1, "x" * (2**24 - 300)]
    for tree in trees:
        saved(tmp_path / "file", tree)
        assert same(load_tensors(tmp_path / "file", FORMAT), tree)
    saved(tmp_path / "file", [shared, torch._neg_view(shared)])  # as the imaginary part of a conjugate is
    assert [part.tolist() for part in load_tensors(tmp_path / "file", FORMAT)] == [[1, 1], [-1, -1]]


def test_what_makes_no_tree(tmp_path: Path) -> None:
    for tree in (
        {1.5: 2},
        {"a": {None: 1}},
        {"a": object()},
        b"bytes",
        {"a": torch.zeros(3).to_sparse()},
        torch.zeros(3, dtype=torch.complex64),
        {True: 1},
        *NOT_READ.values(),
    ):
        with pytest.raises(TypeError, match=r"^(the tree|[\w.]+) "):
            save_tensors(tmp_path / "file", tree, FORMAT)
    assert list(tmp_path.iterdir()) == []


def test_gradients_and_dict_types_are_left_behind(tmp_path: Path) -> None:
    saved(tmp_path / "file", OrderedDict(a=torch.ones(3, requires_grad=True)))
    loaded = load_tensors(tmp_path / "file", FORMAT)
    assert type(loaded) is dict
    assert (type(loaded["a"]), loaded["a"].requires_grad, loaded["a"].tolist()) == (Tensor, False, [1, 1, 1])


# --- what is no such file, or was damaged


def test_what_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_tensors(tmp_path / "none", FORMAT)
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo(tmp_path / "pipe")
    for name, said in {"": "no regular file", "pipe": "no regular file", "loop": "cannot be read: .*symbolic"}.items():
        with pytest.raises(BadFileError, match=said):
            load_tensors(tmp_path / name, FORMAT)


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file(tmp_path: Path, name: str) -> None:
    whole = saved(tmp_path / "file", content("manual"))
    damaged = read(tmp_path / "file", DAMAGES[name].make(whole))
    assert isinstance(damaged, BadFileError)
    assert re.search(DAMAGES[name].said, str(damaged))


@pytest.mark.parametrize("name", TREES)
def test_a_tree_made_to_do_harm(tmp_path: Path, name: str) -> None:
    text, said = TREES[name]
    refused = read(tmp_path / "file", sealed(text, {"a": torch.zeros(3)}))
    assert isinstance(refused, BadFileError)
    assert re.search(said, str(refused))


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_is_not_opened(tmp_path: Path, name: str) -> None:
    """Though loading it without care would execute it."""
    canary = tmp_path / "canary"
    refused = read(tmp_path / "file", PICKLES[name](canary))
    assert isinstance(refused, BadFileError)
    assert ("it is a pickle" in str(refused)) is (name != "bare pickle, protocol 0")
    assert not canary.exists()
    if name.startswith("bare"):
        pickle.loads((tmp_path / "file").read_bytes())  # noqa: S301
    else:
        torch.load(tmp_path / "file", weights_only=False)
    assert canary.exists()


def test_every_bit_counts(tmp_path: Path) -> None:
    tree = {"position": {"lr": 0.25, "epoch": 3}, "words": ["日本", "a"], "w": torch.tensor([1.0, 2.0]), 7: None}
    whole = saved(tmp_path / "file", tree)
    for place in range(8 * len(whole)):
        flipped = bytearray(whole)
        flipped[place // 8] ^= 1 << place % 8
        assert isinstance(read(tmp_path / "file", flipped), BadFileError), place


@pytest.mark.parametrize("setup", ["manual", "amp"])
def test_a_file_changed_at_random_is_refused_or_read_as_it_was(tmp_path: Path, setup: str) -> None:
    original = content(setup)
    whole = saved(tmp_path / "file", original)
    refused = []

    @fuzz(300)
    @given(byte_changes(whole))
    def check(damaged: bytes) -> None:
        found = read(tmp_path / "file", damaged)
        refused.append(isinstance(found, BadFileError))
        assert refused[-1] or same(found, original)

    check()
    assert sum(refused) > len(refused) / 2


json_keys = st.sampled_from(["$tensor", "$tuple", "$pairs", "$", "a", "", "__metadata__"]) | st.text(max_size=2)
json_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.sampled_from("ab"),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(json_keys, inner, max_size=2)
        | st.just({"$tensor": "a"})
        | st.lists(st.tuples(keys, inner), max_size=2).map(lambda pairs: {"$pairs": pairs})
    ),
    max_leaves=10,
)


def test_any_json_is_a_tree_or_refused(tmp_path: Path) -> None:
    accepted = []

    @fuzz(600)
    @given(json_trees)
    def check(tree: Any) -> None:
        found = read(tmp_path / "file", sealed_tree(tree, FORMAT, {"a": torch.arange(3.0), "b": torch.zeros(())}))
        accepted.append(not isinstance(found, BadFileError))
        if accepted[-1]:
            save_tensors(tmp_path / "again", found, FORMAT)
            assert same(load_tensors(tmp_path / "again", FORMAT), found)

    check()
    assert min(accepted.count(True), accepted.count(False)) > 10


# --- the machine


def test_a_read_error_of_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    saved(tmp_path / "file", [1])
    monkeypatch.setattr(Path, "open", fail)
    with pytest.raises(BadFileError, match=r"^it cannot be read: Input/output error$"):
        load_tensors(tmp_path / "file", FORMAT)


def test_a_file_larger_than_the_memory(tmp_path: Path, monkeypatch, capsys) -> None:
    """It may be a good one."""

    def fail(*_: Any) -> None:
        raise MemoryError

    saved(tmp_path / "file", [1])
    monkeypatch.setattr("safetensors.torch.load", fail)
    assert exit_code(lambda: load_tensors(tmp_path / "file", FORMAT)) == 1
    assert capsys.readouterr().err == "error: out of memory\n"


@needs_bounds
def test_damaged_files_take_no_memory(tmp_path: Path) -> None:
    """100 MiB, for files that claim a terabyte, and for one that has a terabyte of zeros."""
    good = tmp_path / "good"
    whole = saved(good, content("amp"))
    paths = [tmp_path / str(i) for i in range(len(DAMAGES))]
    for path, damage in zip(paths, DAMAGES.values(), strict=True):
        path.write_bytes(damage.make(whole))
    huge = tmp_path / "huge"
    huge.write_bytes(whole)
    os.truncate(huge, 2**40)
    assert read_bounded(100, good, *paths, huge) == ["read", *["refused"] * (len(paths) + 1)]


@pytest.mark.slow
@needs_bounds
def test_a_header_takes_thirty_times_its_size(tmp_path: Path) -> None:
    small, lists = tmp_path / "small", tmp_path / "lists"
    saved(small, torch.zeros(2))
    text = json.dumps({"format": FORMAT, "tree": [[]]}).replace("[[]]", f"[{'[],' * 2**20}[]]")
    lists.write_bytes(sealed(text))
    assert read_bounded(30 * 3, small, lists) == ["read", "read"]


@pytest.mark.slow
@needs_bounds
def test_a_large_file_takes_its_size_twice(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    saved(small, torch.zeros(2))
    saved(large, [torch.zeros(2**20) + i for i in range(16)])
    assert read_bounded(2 * 64 + 16, small, large) == ["read", "read"]
    assert read_bounded(64 + 32, small, large) == ["read", "no memory"]
