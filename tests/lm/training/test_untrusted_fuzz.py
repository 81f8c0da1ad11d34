"""Files changed at random: what was saved is read back in every bit, or the file is refused; nothing else happens."""

import io
import zipfile
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from checkpoints import content, same
from fuzzing import byte_changes, fuzz
from hostile import archive, integer, model_content, program, rewritten, saved, storage, tensor, text
from lm.model.model_file import load_model
from roundoff.errors import BadFileError, UsageError
from roundoff.runs.tensorfile import load_tensors

ORIGINALS = {"model": model_content(), "checkpoint": content("manual")}
FILES = {name: saved(original) for name, original in ORIGINALS.items()}


def read(path: Path, whole: bytes) -> Any:
    """What is in the file; BadFileError itself where it is refused."""
    path.write_bytes(whole)
    try:
        return load_tensors(path)
    except BadFileError as error:
        text = str(error)
        assert text.isprintable()
        assert 0 < len(text) <= 150
        return BadFileError


def assert_plain(value: Any, depth: int = 0) -> None:
    assert depth <= 20
    if isinstance(value, torch.Tensor):
        assert type(value) is torch.Tensor
        assert value.numel() * value.element_size() <= value.untyped_storage().nbytes()
        value.double().sum()  # reads every element
    elif isinstance(value, dict | list | tuple):
        for inside in value.values() if isinstance(value, dict) else value:
            assert_plain(inside, depth + 1)
    else:
        assert type(value) in (str, int, float, bool, type(None))


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_refused_or_read_as_it_was(tmp_path: Path, name: str) -> None:
    refused = []

    @fuzz(300)
    @given(byte_changes(FILES[name]))
    def check(whole: bytes) -> None:
        found = read(tmp_path / "file", whole)
        refused.append(found is BadFileError)
        assert found is BadFileError or same(found, ORIGINALS[name])

    check()
    assert sum(refused) > len(refused) / 2


@pytest.mark.parametrize("name", FILES)
def test_every_bit_of_the_records_is_checked(tmp_path: Path, name: str) -> None:
    """One flip in each of them; zip has no checksum over names and sizes, and torch.save leaves gaps."""
    whole = FILES[name]
    with zipfile.ZipFile(io.BytesIO(whole)) as file:
        records = [record for record in file.infolist() if record.file_size]
    for i, record in enumerate(records):
        header = whole[record.header_offset : record.header_offset + 30]
        start = record.header_offset + 30 + int.from_bytes(header[26:28], "little")
        start += int.from_bytes(header[28:30], "little") + 7 * i % record.file_size
        flipped = whole[:start] + bytes([whole[start] ^ (1 << i % 8)]) + whole[start + 1 :]
        assert read(tmp_path / "file", flipped) is BadFileError, record.filename


@pytest.mark.parametrize("name", FILES)
def test_a_record_replaced(tmp_path: Path, name: str) -> None:
    """By someone who sets the checksum right: then the file may be a good one, of other content."""
    with zipfile.ZipFile(io.BytesIO(FILES[name])) as file:
        records = {record: file.read(record) for record in file.namelist()}

    @fuzz(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        chosen = data.draw(st.sampled_from(sorted(records)) | st.just("archive/data.pkl"))
        replaced = data.draw(byte_changes(records[chosen]) | st.sampled_from(sorted(records.values())))
        found = read(tmp_path / "file", rewritten(FILES[name], lambda n, old: (n, replaced if n == chosen else old)))
        if found is not BadFileError:
            assert_plain(found)

    check()


PIECES = [
    *(bytes([code]) for code in b"(.0)]}NRQabetsu\x85\x86\x87\x88\x89o\x81\x93"),
    *(b"q" + bytes([i]) for i in range(3)),
    *(b"h" + bytes([i]) for i in range(3)),
    *(integer(i) for i in (0, 1, 4, -1, 2**40, 2**70)),
    *(text(word) for word in ("storage", "0", "cpu", "_metadata", "")),
    *(f"c{name}\n".encode() for name in ("torch\nFloatStorage", "collections\nOrderedDict", "builtins\nbytearray")),
    b"ctorch._utils\n_rebuild_tensor_v2\n",
    b"ccollections\nOrderedDict\n)R",
    storage("FloatStorage", integer(4)),
    storage("HalfStorage", integer(8)),
    storage("LongStorage", integer(2), "1"),
    tensor((4,)),
    tensor((2, 2), (2, 1)),
    tensor((2,), kind="LongStorage", numel=integer(2), key="1"),
]


@pytest.mark.slow
def test_pickles_at_random(tmp_path: Path) -> None:
    """Made of the instructions that torch.save uses, in any order."""
    accepted = []
    values = st.sampled_from([piece for piece in PIECES if len(piece) > 4])

    @fuzz(600)
    @given(st.lists(st.sampled_from(PIECES), max_size=12) | st.lists(values | st.sampled_from([b"N", b"}", b"h\0"])))
    def check(pieces: list[bytes]) -> None:
        pickled = program(b"]q\0(", *pieces, b"e")
        storages = {f"data/{key}": bytes(range(16)) for key in "01" if text(key) + text("cpu") in pickled}
        value = read(tmp_path / "file", archive(pickled, **storages))
        accepted.append(value is not BadFileError)
        if value is not BadFileError:
            assert_plain(value)

    check()
    assert sum(accepted) > 20


def test_a_changed_model_is_a_model_or_refused(tmp_path: Path) -> None:
    values = st.sampled_from(
        [None, -1, 0, 1, 2, 7, 1.5, True, "LSTM", "GRU", [], {}, "x" * 300, 2**62, torch.zeros(16)]
    )
    words = st.lists(st.text(max_size=3) | st.just("\udfff"), max_size=17)

    @fuzz(150)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        whole = model_content()
        part = data.draw(st.sampled_from(["options", "weights", "vocabulary", "top"]))
        place: dict[str, Any] = whole if part in ("top", "vocabulary") else dict(whole[part])
        name = part if part == "vocabulary" else data.draw(st.sampled_from(sorted(place)))
        place[name] = data.draw(words if part == "vocabulary" else values)
        torch.save(whole if place is whole else whole | {part: place}, tmp_path / "file")
        with suppress(UsageError):
            model, vocabulary = load_model(tmp_path / "file")
            "".join(vocabulary).encode()
            model(torch.zeros((1, 1), dtype=torch.int64), model.init_hidden(1))

    check()
