"""Tensor files made to do harm, and tools to make more: each table has names, ways to make a file, and the refusal."""

import builtins
import io
import json
import os
import pickle
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor


def sealed(text: str, tensors: dict[str, Tensor] | None = None) -> bytes:
    """A file with any text where the tree should be, and the checksum of that."""
    tensors = tensors or {}
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(tensor.flatten().view(torch.uint8).numpy().tobytes(), crc)
    return safetensors.torch.save(tensors, {"roundoff": f"{crc:08x} {text}"})


def sealed_tree(tree: Any, format: str, tensors: dict[str, Tensor] | None = None) -> bytes:
    """A file with any JSON as its tree."""
    return sealed(json.dumps({"format": format, "tree": tree}), tensors)


def with_header(header: Any, data: bytes = b"") -> bytes:
    """A file with any header: bytes as they are, anything else as JSON."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def changed_header(whole: bytes, change: Callable[[dict[str, Any]], object]) -> bytes:
    """The file with its header changed."""
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    change(header)
    return with_header(header, whole[8 + length :])


class Damage(NamedTuple):
    """What is made of a good file, and what must be said of it."""

    make: Callable[[bytes], bytes]
    said: str


def _flipped(whole: bytes, place: int) -> bytes:
    return whole[:place] + bytes([whole[place] ^ 16]) + whole[place + 1 :]


def _claim(shape: list[int], end: int, dtype: str = "F32") -> Callable[[bytes], bytes]:
    entry = {"dtype": dtype, "shape": shape, "data_offsets": [0, end]}
    return lambda _: with_header({"__metadata__": {"roundoff": "x"}, "a": entry}, bytes(16))


def _moved(header: dict[str, Any]) -> None:
    """Let the last two tensors lie at one place."""
    *_, (_, first), (_, second) = [item for item in header.items() if item[0] != "__metadata__"]
    first["data_offsets"] = second["data_offsets"]


DAMAGES: dict[str, Damage] = {
    "empty": Damage(lambda _: b"", "no safetensors file, or was cut off"),
    "seven bytes": Damage(lambda whole: whole[:7], "cut off"),
    "junk": Damage(lambda _: random.Random(1).randbytes(5000), "no safetensors file"),
    "a text": Damage(lambda _: b"no checkpoint at all\n" * 100, "no safetensors file"),
    "zeros": Damage(lambda whole: bytes(len(whole)), "Expecting value"),
    "cut in its header": Damage(lambda whole: whole[:100], "cut off"),
    "half": Damage(lambda whole: whole[: len(whole) // 2], "its header speaks of|cut off"),
    "one byte short": Damage(lambda whole: whole[:-1], "its header speaks of"),
    "one byte more": Damage(lambda whole: whole + b"x", "its header speaks of"),
    "a bit of a tensor": Damage(lambda whole: _flipped(whole, len(whole) - 9), "its checksum is wrong"),
    "a letter of its tree": Damage(lambda whole: _flipped(whole, whole.index(b"tree") + 1), "its checksum is wrong"),
    "a header of 17 MiB": Damage(lambda _: with_header(b" " * 17 * 2**20), "more than 16777216 bytes"),
    "a header that is no JSON": Damage(lambda _: with_header(b"{}]"), "Extra data"),
    "a header that is no text": Damage(lambda _: with_header(b'{"\xff": 1}'), "codec can't decode"),
    "a header of 100,000 levels": Damage(lambda _: with_header(b"[" * 100_000), "recursion"),
    "a header that is a list": Damage(lambda _: with_header([]), "it is no safetensors file"),
    "no metadata": Damage(lambda whole: changed_header(whole, lambda h: h.pop("__metadata__")), "not of this project"),
    "metadata of another project": Damage(
        lambda whole: changed_header(whole, lambda h: h.update(__metadata__={"format": "pt"})), "not of this project"
    ),
    "metadata that is no object": Damage(lambda _: with_header({"__metadata__": 7}), "not of this project"),
    "an entry that is no object": Damage(
        lambda _: with_header({"__metadata__": {"roundoff": "x"}, "a": 7}), "'int' object"
    ),
    "a terabyte": Damage(_claim([2**38], 2**40), "its header speaks of 1099511"),
    "a shape that overflows": Damage(_claim([2**62, 4], 16), "overflow"),
    "a negative size": Damage(_claim([-1], 16), "invalid value"),
    "another shape": Damage(_claim([3], 16), "invalid|not fully covered"),
    "an unknown type": Damage(_claim([16], 16, "F1"), "unknown variant|F1"),
    "tensors in one place": Damage(lambda whole: changed_header(whole, _moved), "has .* bytes|offset"),
}
"""Files that a bad disk, or somebody bad, makes of any good one."""

TREES: dict[str, tuple[str, str]] = {
    "no JSON": ("[1, 2", "Expecting|delimiter"),
    "no object": ("[]", "not of this project"),
    "no tree": ('{"format": "test 1"}', "not of this project"),
    "another format": ('{"format": "x", "tree": 1}', "of format 'x', not"),
    "a format that a terminal obeys": (r'{"format": "\u001b[2J\n", "tree": 1}', r"\\x1b\[2J"),
    **{
        name: (f'{{"format": "test 1", "tree": {tree}}}', said)
        for name, tree, said in (
            ("21 levels", "[" * 22 + "]" * 22, "nested more than 20 deep"),
            ("a hundred thousand levels", "[" * 100_000 + "]" * 100_000, "recursion|nested"),
            ("a hundred thousand objects", '{"a":' * 100_000 + "1" + "}" * 100_000, "recursion|nested"),
            ("an integer of 65 bits", str(2**64), "more than 64 bits"),
            ("an integer of 5000 digits", "9" * 5000, "digits|64 bits"),
            ("an unknown tag", '{"$set": []}', r"has '\$set'"),
            ("a tensor that is not there", '{"$tensor": "b"}', "'b' is missing"),
            ("a tensor named by a number", '{"$tensor": 7}', r"has '\$tensor'"),
            ("a tensor in 5 places", "[" + ", ".join(['{"$tensor": "a"}'] * 5) + "]", "more than 4 places"),
            ("a tuple of text", '{"$tuple": "abc"}', r"has '\$tuple'"),
            ("pairs of three", '{"$pairs": [[1, 2, 3]]}', r"has '\$pairs'"),
            ("a pair with a list for a key", '{"$pairs": [[[], 2]]}', r"has '\$pairs'"),
            ("a pair with a fraction for a key", '{"$pairs": [[1.5, 2]]}', r"has '\$pairs'"),
        )
    },
}
"""Texts with the right checksum, in a file that has the tensor "a"."""


class Call:
    """Unpickling this calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def _torch_saved(content: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


PICKLES: dict[str, Callable[[Path], bytes]] = {
    "torch.save": lambda canary: _torch_saved(Call(os.system, f"touch {canary}")),
    "torch.save, old format": lambda canary: _torch_saved(
        Call(Path.touch, canary), _use_new_zipfile_serialization=False
    ),
    "in a model": lambda canary: _torch_saved({"options": {"kind": Call(Path.touch, canary)}, "vocabulary": []}),
    "bare pickle": lambda canary: pickle.dumps(
        Call(builtins.eval, f"__import__('pathlib').Path({str(canary)!r}).touch()")
    ),
    "bare pickle, protocol 0": lambda canary: pickle.dumps(Call(os.mkdir, str(canary)), 0),
}
"""Files that make the canary when they are unpickled."""
