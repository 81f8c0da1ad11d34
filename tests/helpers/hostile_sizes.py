"""Files that claim what they do not hold, or hold what no trainer writes, by name, each with what must be said of it.

`COUNT` is the number of hostile files in all, those of `hostile` included.
"""

import io
import random
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from hostile import (
    COMMANDS,
    FOUR,
    HostileFile,
    archive,
    integer,
    model_content,
    program,
    rewritten,
    saved,
    storage,
    tensor,
    text,
)
from programs import make_model

ORDERED = b"ccollections\nOrderedDict\n)R"


def fixed(content: bytes) -> Callable[[Path], bytes]:
    """A file that has no use for a canary."""
    return lambda _: content


def pickled(*parts: bytes, storages: tuple[bytes, ...] = (FOUR,)) -> Callable[[Path], bytes]:
    """A file with a pickle made by hand."""
    return fixed(archive(program(*parts), *storages))


def spoiled(**parts: Any) -> Callable[[Path], bytes]:
    """A model file with parts replaced."""
    return lambda _: saved(model_content(**parts))


def options(**changed: Any) -> Callable[[Path], bytes]:
    """A model file with options replaced."""
    return spoiled(options=make_model().options | changed)


def weights(**changed: Any) -> Callable[[Path], bytes]:
    """A model file with weights replaced; dots are double underscores."""
    return spoiled(weights=make_model().state_dict() | {k.replace("__", "."): v for k, v in changed.items()})


def compressed() -> bytes:
    """64 MiB of zeros in 64 KiB."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", program(tensor((2**24,), numel=integer(2**24))))
        with file.open("archive/data/0", "w") as record:
            for _ in range(2**6):
                record.write(bytes(2**20))
    return out.getvalue()


def with_record(name: str, content: bytes = b"") -> Callable[[Path], bytes]:
    """A working model with one more record."""

    def make(_: Path) -> bytes:
        out = io.BytesIO(saved(model_content()))
        with zipfile.ZipFile(out, "a") as file:
            file.writestr(name, content)
        return out.getvalue()

    return make


def twice() -> bytes:
    """Two data.pkl, of which one reader could take the first and another one the second."""
    whole = with_record("archive/data.pkX", program(b"N"))(Path())
    return whole.replace(b"data.pkX", b"data.pkl")


def overlapping() -> bytes:
    """A thousand records at one place of the file."""
    name = b"archive/data/%03d"
    start = archive(program(b"N"))
    with zipfile.ZipFile(io.BytesIO(start)) as file:
        end = file.start_dir
    body, directory = start[:end], b""
    for i in range(1000):
        header = struct.pack("<4s5HL2L2H", b"PK\3\4", 20, 0, 0, 0, 0, 0, 2**20, 2**20, 16, 0) + name % i
        entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 2**20, 2**20, 16, 0, 0, 0, 0, 0, len(body))
        body += header
        directory += entry + name % i
    body += bytes(2**20)
    tail = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1000, 1000, len(directory), len(body), 0)
    return body + directory + tail


def flipped() -> bytes:
    """A model with one bit of a weight changed, as a bad disk would."""
    whole = bytearray(saved(model_content()))
    whole[whole.index(make_model().encoder.weight.detach().numpy().tobytes()) + 13] ^= 16
    return bytes(whole)


def many(*parts: bytes, times: int = 2**17) -> Callable[[Path], bytes]:
    """A list of so many of the same."""
    return lambda _: archive(program(b"](", b"".join(parts) * times, b"e"))


def directory_bomb() -> bytes:
    """Nothing but a table of contents."""
    entry = struct.pack("<4s6H3L5H2L", b"PK\1\2", 20, 20, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0) + b"a"
    size = len(entry) * 50_000
    return entry * 50_000 + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 50_000, 50_000, size, 0, 0)


BIG_DICT = b"}(" + b"".join(integer(i) + b"N" for i in range(300)) + b"uq\0"

DAMAGED: dict[str, HostileFile] = {
    "an empty file": HostileFile(fixed(b""), "does not end as a file"),
    "junk": HostileFile(fixed(random.Random(1).randbytes(5000)), "does not end as a file"),
    "half a model": HostileFile(lambda _: saved(model_content())[:2000], "cut off"),
    "a flipped bit": HostileFile(lambda _: flipped(), "Bad CRC-32"),
    "a comment at its end": HostileFile(lambda _: saved(model_content())[:-2] + b"\4\0abcd", "does not end as a file"),
    "two ends": HostileFile(
        lambda _: saved(model_content())[:-2] + b"\x16\0" + archive(program(b"N"))[-22:], "Bad magic|Bad offset"
    ),
    "a zip bomb": HostileFile(lambda _: compressed(), "is compressed"),
    "a record twice": HostileFile(lambda _: twice(), "twice"),
    "overlapping records": HostileFile(lambda _: overlapping(), "overlap"),
    "a table of contents alone": HostileFile(lambda _: directory_bomb(), "table of contents"),
    "an empty archive": HostileFile(fixed(b"PK\5\6" + bytes(18)), "no item named"),
    "TorchScript": HostileFile(with_record("archive/constants.pkl", program(b")")), "record 'archive/constants.pkl'"),
    "code": HostileFile(with_record("archive/code/__torch__.py", b"import os"), "record 'archive/code/"),
    "a record of a long name": HostileFile(with_record("archive/" + "x" * 10_000), "record 'archive/xxx.*…"),
    "another folder": HostileFile(with_record("other/version"), "one folder"),
    "a path upwards": HostileFile(with_record("../../data/7"), "record '../../data/7'"),
    "a data.pkl in capitals": HostileFile(with_record("archive/DATA.PKL"), "record 'archive/DATA.PKL'"),
    "no data.pkl": HostileFile(
        lambda _: rewritten(saved(model_content()), lambda n, old: None if n.endswith("pkl") else (n, old)),
        "no item named",
    ),
    "a storage missing": HostileFile(
        lambda _: rewritten(saved(model_content()), lambda n, old: None if n.endswith("data/3") else (n, old)),
        "storage '3' has not the size",
    ),
    "a storage too many": HostileFile(with_record("archive/data/99", FOUR), "tensors that its pickle does not name"),
}

CLAIMS: dict[str, HostileFile] = {
    "a gigantic tensor": HostileFile(pickled(tensor((10**12,))), "of 1000000000000 elements in a storage of 4"),
    "sizes that overflow 64 bits": HostileFile(pickled(tensor((2**40,) * 3, (0, 0, 0))), "elements in a storage of 4"),
    "one element expanded": HostileFile(pickled(tensor((10**12,), (0,))), "elements in a storage of 4"),
    "an offset beyond the end": HostileFile(pickled(tensor((4,), offset=integer(1))), "in a storage of 4"),
    "a negative offset": HostileFile(pickled(tensor((1,), offset=integer(-1))), "no whole number"),
    "a negative size": HostileFile(pickled(tensor((-4,))), "no whole number"),
    "a negative stride": HostileFile(pickled(tensor((4,), (-1,))), "no whole number"),
    "a stride beyond the end": HostileFile(pickled(tensor((2, 2), (4, 1))), "in a storage of 4"),
    "a size of text": HostileFile(pickled(tensor("4")), "does not write"),
    "200 dimensions": HostileFile(pickled(tensor((1,) * 200, (1,) * 200)), "of 200 dimensions"),
    "more than the record": HostileFile(pickled(tensor((9999,), numel=integer(9999))), "storage '0' has not the size"),
    "less than the record": HostileFile(pickled(tensor((2,), numel=integer(2))), "storage '0' has not the size"),
    "a length that is a fraction": HostileFile(
        pickled(tensor((4,), numel=b"G" + struct.pack(">d", 4.0))), "refers to what is no storage"
    ),
    "a storage of two types": HostileFile(
        pickled(tensor((4,)), b"0", tensor((8,), kind="HalfStorage", numel=integer(8))), "instruction POP"
    ),
    "a storage of two types, kept": HostileFile(
        pickled(b"](", tensor((4,)), tensor((8,), kind="HalfStorage", numel=integer(8)), b"e"), "has two types"
    ),
    "a storage that is none": HostileFile(pickled(text("storage"), b"Q"), "too many values|not enough values|expected"),
    "a storage as content": HostileFile(pickled(storage("FloatStorage", integer(4))), "of type TypedStorage"),
    "a quantized tensor": HostileFile(
        pickled(tensor((4,), function=b"ctorch._utils\n_rebuild_qtensor\n")), "names 'torch._utils._rebuild_qtensor'"
    ),
    "a sparse tensor": HostileFile(lambda _: saved(torch.eye(4).to_sparse()), "which no model needs"),
    "a meta tensor": HostileFile(lambda _: saved(torch.empty(10**12, device="meta")), "which no model needs"),
    "a complex tensor": HostileFile(lambda _: saved(torch.ones(4, dtype=torch.complex64)), "ComplexFloatStorage"),
    "a tensor with hooks": HostileFile(
        pickled(tensor((4,), hooks=b"}" + integer(1) + b"Ns")), "a tensor that torch.save does not write"
    ),
    "a tensor that gets hooks": HostileFile(
        pickled(b"](", ORDERED, b"q\1", tensor((4,), hooks=b"h\1"), b"h\1", integer(1), b"Ns", b"e"),
        "not a dense one of real numbers",
    ),
    "many views of one tensor": HostileFile(
        pickled(b"](", tensor((4,)) * 17, b"e"), "tensors claim more than it holds"
    ),
}

CONTENTS: dict[str, HostileFile] = {
    "100 GB of bytearray": HostileFile(pickled(b"cbuiltins\nbytearray\n", integer(10**11), b"\x85R"), "bytearray"),
    "bytes": HostileFile(lambda _: saved(b"bytes"), "_codecs.encode"),
    "a set": HostileFile(lambda _: saved({1, 2}), "names '(__builtin__|builtins).set'"),
    "an object": HostileFile(lambda _: saved(make_model()), "which no model needs"),
    "a dtype": HostileFile(lambda _: saved(torch.float32), "torch.float32"),
    "a storage class": HostileFile(
        lambda _: archive(program(b"ctorch\nFloatStorage\n")), "it holds a value of type StorageType"
    ),
    "a function": HostileFile(
        lambda _: archive(program(b"ctorch._utils\n_rebuild_tensor_v2\n")), "it holds a value of type function"
    ),
    "a dict copied many times": HostileFile(
        many(BIG_DICT, b"0ccollections\nOrderedDict\nh\0\x85R", times=1), "instruction POP"
    ),
    "a dict copied many times over": HostileFile(
        many(BIG_DICT, b"ccollections\nOrderedDict\nh\0\x85R", times=1), "calls what torch.save does not call"
    ),
    "a dict copied into attributes": HostileFile(
        many(b"ccollections\nOrderedDict\n)R", BIG_DICT, b"b", times=1), "sets attributes"
    ),
    "attributes of a tensor": HostileFile(pickled(tensor((4,)), b"}b"), "sets attributes"),
    "an item of a number": HostileFile(lambda _: archive(program(integer(1), b"NNs")), "of what is no dict"),
    "an item appended to a dict": HostileFile(lambda _: archive(program(b"}Na")), "no list"),
    "a dict with a tensor as key": HostileFile(pickled(b"}", tensor((4,)), b"Ns"), "key of type _Tensor"),
    "a dict with a tuple as key": HostileFile(lambda _: saved({(1, 2): 3}), "key of type tuple"),
    "numbers of one hash": HostileFile(
        lambda _: saved({i * (2**61 - 1): 0 for i in range(2, 100)}), "more than 64 bits"
    ),
    "200,000 lists": HostileFile(many(b"]", times=200_000), "dicts, lists and tensors"),
    "16 million values": HostileFile(many(b"N", times=2**24), "more than 16777216 bytes"),
    "a million values": HostileFile(many(b"N", times=2**20), "instructions"),
    "a list within itself": HostileFile(lambda _: archive(program(b"]q\0h\0a")), "nested more than"),
    "a thousand levels": HostileFile(lambda _: archive(program(b"N", b"\x85" * 1000)), "nested more than"),
    "2**30 values from 30 lists": HostileFile(
        lambda _: archive(program(b"]", *(b"q\0](" + b"h\0" * 40 + b"e" for _ in range(10)))), "holds more than"
    ),
    "a pickle after the pickle": HostileFile(lambda _: archive(program(b"N") + program(b"N")), "ends early"),
    "a pickle without end": HostileFile(lambda _: archive(program(b"N")[:-1]), "exhausted|ends early"),
    "a pickle of nothing": HostileFile(lambda _: archive(program()), "pop from empty list"),
    "a word longer than the pickle": HostileFile(lambda _: archive(program(b"X\xff\xff\xff\x7f")), "expected"),
    "an unknown place": HostileFile(lambda _: archive(program(b"h\7")), "7"),
}

LIES: dict[str, HostileFile] = {
    "no model": HostileFile(lambda _: saved([1, 2, 3]), "no model file of this project"),
    "another program's model": HostileFile(lambda _: saved(make_model().state_dict()), "no model file"),
    "a vocabulary too large": HostileFile(spoiled(vocabulary=[str(i) for i in range(17)]), "17 words for 16 scores"),
    "a vocabulary too small": HostileFile(spoiled(vocabulary=[str(i) for i in range(8)]), "8 words for 16 scores"),
    "no vocabulary": HostileFile(spoiled(vocabulary=[], options=make_model().options | {"ntokens": 0}), "is empty"),
    "a vocabulary of numbers": HostileFile(spoiled(vocabulary=list(range(10))), "not a list of words"),
    "words that cannot be written": HostileFile(spoiled(vocabulary=["\ud800"] * 10), "can't encode"),
    "more scores than weights": HostileFile(options(ntokens=24), "10 words for 24 scores"),
    "a layer of 10**12 units": HostileFile(options(nhid=10**12), "contradicts itself"),
    "10**9 layers": HostileFile(options(nlayers=10**9), "weights for 1000000000 layers"),
    "layers of a fraction": HostileFile(options(nlayers=1.5), "contradicts itself"),
    "dropout above 1": HostileFile(options(dropout=2.0), "contradicts itself"),
    "a negative size": HostileFile(options(emsize=-8), "contradicts itself"),
    "options of another type": HostileFile(options(kind={"LSTM": 1}), "contradicts itself"),
    "an option too many": HostileFile(options(device="cuda"), "contradicts itself"),
    "tied, though it is not": HostileFile(options(tied="yes"), "tied is 'yes'"),
    "another shape": HostileFile(weights(decoder__weight=torch.zeros(8, 16)), "size mismatch"),
    "another number of dimensions": HostileFile(weights(encoder__weight=torch.zeros(128)), "size mismatch"),
    "a weight too many": HostileFile(weights(more=torch.zeros(3)), "Unexpected key"),
    "a weight's name that a terminal obeys": HostileFile(
        lambda _: saved(model_content(weights=make_model().state_dict() | {"\x1b[2J\n": torch.zeros(3)})),
        r"Unexpected key.*\\x1b\[2J",
    ),
    "a weight of text": HostileFile(weights(decoder__bias="text"), "contradicts itself"),
    "a weight of integers": HostileFile(
        weights(decoder__bias=torch.zeros(16, dtype=torch.int64)), "decoder.bias is not a tensor of finite numbers"
    ),
    "a weight of nan": HostileFile(
        weights(decoder__bias=torch.full((16,), torch.nan)), "decoder.bias is not a tensor of finite numbers"
    ),
    "a weight that fp32 cannot hold": HostileFile(
        weights(decoder__bias=torch.full((16,), 1e300, dtype=torch.float64)),
        "decoder.bias is not a tensor of finite numbers",
    ),
    "weights whose product is infinite": HostileFile(
        weights(decoder__weight=torch.full((16, 8), 3e38), decoder__bias=torch.full((16,), 3e38)),
        "scores of word 1 are not finite",
    ),
}

MODELS = {**COMMANDS, **DAMAGED, **CLAIMS, **CONTENTS, **LIES}
COUNT = len(MODELS)
