"""Write and read files that hold a tree of tensors and plain values: checkpoints and models.

The format is safetensors. Such a file is a table of names, types, shapes and places as JSON, and then the bytes of the
tensors. It has no instructions, so a reader has nothing to execute. The table must account for every byte of the file,
so a file cannot claim more memory than it has bytes. A pickle, which torch.save writes, is a program, and no check
of it is short.

The tree stands as JSON in the table's metadata, with a CRC-32 of everything, since safetensors has no checksum. The
checksum finds damage. It does not say who wrote a file.
"""

import json
import os
import stat
import zlib
from collections import Counter
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from roundoff.errors import BadFileError, printable
from roundoff.runs.files import write_atomically

MAX_HEADER_BYTES = 2**24
"""The limit of the table with its metadata. A vocabulary of a million words fits."""

MAX_DEPTH = 20

MAX_SHARING = 4
"""The number of places of the tree that may hold the same tensor. Tied weights have two, and so may a best model."""

_KEY = "roundoff"
"""The entry of the metadata."""

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types of tensors that a tree may hold, as safetensors calls them."""


def save_tensors(path: Path, tree: Any, format: str, keep: Path | None = None) -> None:
    """Write `tree` to `path`, whole or not at all.

    A tree is made of dict (keys are str or int), list, tuple, str, int, float, bool, None and dense tensors. A tensor
    that stands in several places is written once.

    Args:
        path: the file.
        tree: what to write.
        format: what kind of file this is, and in which version; `load_tensors` asks for it.
        keep: where the old content of `path` goes; None drops it.

    Raises:
        OSError: the file cannot be written.
        TypeError: the tree holds something else, or is too much for `load_tensors`: deeper than `MAX_DEPTH`, with a
            tensor in more than `MAX_SHARING` places, an int of more than 64 bits, or a header that is too long.
    """
    tensors = _Tensors()
    text = json.dumps({"format": format, "tree": _to_json(tree, "", tensors)}, ensure_ascii=False)
    try:
        header = _header(f"{_checksum(text, tensors.by_name)} {text}", tensors.by_name)
    except UnicodeEncodeError:
        raise TypeError("the tree has a text with a lone surrogate, which no file takes") from None
    if len(header) > MAX_HEADER_BYTES:
        raise TypeError(f"the tree takes a header of {len(header)} bytes; at most {MAX_HEADER_BYTES} are read")

    def write(file: IO[bytes]) -> None:  # piece by piece; safetensors would make a copy of all first
        file.write(len(header).to_bytes(8, "little") + header)
        for tensor in tensors.by_name.values():
            file.write(_bytes(tensor))

    write_atomically(path, write, keep)


def load_tensors(path: Path, format: str) -> Any:
    """Return the tree that `save_tensors` wrote with this `format`; its tensors are on the CPU.

    Nothing in the file is executed. Takes memory for two copies of the file, good or bad, and for its header (of up to
    16 MiB) 30 times as much.

    Raises:
        FileNotFoundError: there is no such file.
        BadFileError: the file is something else, was damaged, or is made to do harm. The text is one line of up to 150
            characters.
        MemoryError: so large a file does not fit.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BadFileError("it is no regular file")
        with path.open("rb") as file:
            text = _read_metadata(file)
            file.seek(0)
            tensors = _read_tensors(file)
        return _read_tree(text, tensors, format)
    except (FileNotFoundError, MemoryError):
        raise
    except BadFileError as error:
        raise BadFileError(printable(error, 150)) from None
    except OSError as error:
        raise BadFileError(printable(f"it cannot be read: {error.strerror or error}", 150)) from None
    except Exception as error:  # the readers of a damaged file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadFileError(printable(reason, 150)) from None


class _Tensors:
    """The tensors of a tree, each once, by the name of the first place that holds it."""

    def __init__(self) -> None:
        self.by_name: dict[str, Tensor] = {}
        self._names: dict[Any, str] = {}
        self._places: Counter[str] = Counter()

    def name(self, tensor: Tensor, place: str) -> str:
        """Return the name of `tensor`, which stands at `place`."""
        storage = (tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset())
        view = (*storage, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_neg())
        if view not in self._names or tensor.numel() == 0:  # tensors without elements all begin at 0
            while place in self.by_name or place in ("", "__metadata__"):
                place += "'"
            self._names[view] = place
            self.by_name[place] = tensor.detach().cpu().resolve_neg().contiguous()
        name = self._names[view]
        self._places[name] += 1
        if self._places[name] > MAX_SHARING:
            raise TypeError(f"{place or 'the tree'} has a tensor that stands in more than {MAX_SHARING} places")
        return name


def _to_json(value: Any, place: str, tensors: _Tensors, depth: int = 0) -> Any:
    """Return `value` as JSON. An object with one key that begins with "$" stands for what JSON lacks."""
    where = place or "the tree"
    if depth > MAX_DEPTH:
        raise TypeError(f"{where} is nested more than {MAX_DEPTH} deep")
    if isinstance(value, Tensor) and value.dtype in _DTYPES and value.layout is torch.strided:
        return {"$tensor": tensors.name(value, place)}
    if isinstance(value, dict):
        if not all(type(key) in (str, int) and _is_int64(key) for key in value):
            raise TypeError(f"{where} has a key that is neither str nor an int of 64 bits")
        plain = all(isinstance(key, str) and not key.startswith("$") for key in value)
        below = depth + (1 if plain else 2)
        parts = [(key, _to_json(part, f"{place}.{key}".lstrip("."), tensors, below)) for key, part in value.items()]
        return dict(parts) if plain else {"$pairs": parts}
    if isinstance(value, list | tuple):
        items = [_to_json(part, f"{place}.{i}".lstrip("."), tensors, depth + 1) for i, part in enumerate(value)]
        return items if isinstance(value, list) else {"$tuple": items}
    if value is not None and not isinstance(value, str | int | float):
        raise TypeError(f"{where} is of type {type(value).__name__}, or a tensor of another kind")
    if not _is_int64(value):
        raise TypeError(f"{where} is an integer of more than 64 bits")
    return value


def _is_int64(value: Any) -> bool:
    """Return whether `value` fits into 64 bits, if it is an int."""
    return not isinstance(value, int) or -(2**63) <= value < 2**63


def _from_json(value: Any, tensors: "_Shared", depth: int = 0) -> Any:
    """Return what `_to_json` was given. Lists are filled in place, so that they take memory once."""
    if depth > MAX_DEPTH:
        raise BadFileError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, list):
        for i, part in enumerate(value):
            value[i] = _from_json(part, tensors, depth + 1)
        return value
    if not isinstance(value, dict):
        return value
    tag = next(iter(value), "")
    if not tag.startswith("$"):
        return {key: _from_json(part, tensors, depth + 1) for key, part in value.items()}
    return _from_tag(tag, value[tag], tensors, depth)


def _from_tag(tag: str, content: Any, tensors: "_Shared", depth: int) -> Any:
    if tag == "$tensor" and isinstance(content, str):
        return tensors.take(content)
    if tag == "$tuple" and isinstance(content, list):
        return tuple(_from_json(content, tensors, depth))
    if tag == "$pairs" and isinstance(content, list):
        pairs = _from_json(content, tensors, depth)
        if all(isinstance(pair, list) and len(pair) == 2 and type(pair[0]) in (str, int) for pair in pairs):
            return dict(pairs)
    raise BadFileError(f"its tree has {tag!r} with what does not belong there")


class _Shared:
    """The tensors of a file. Each may be taken a few times, so that a tree cannot multiply them."""

    def __init__(self, by_name: dict[str, Tensor]) -> None:
        self._by_name = by_name
        self._left = dict.fromkeys(by_name, MAX_SHARING)

    def take(self, name: str) -> Tensor:
        """Return the tensor of this name."""
        if not self._left.get(name):
            raise BadFileError(f"its tensor {name!r} is missing, or stands in more than {MAX_SHARING} places")
        self._left[name] -= 1
        return self._by_name[name]


def _header(metadata: str, tensors: dict[str, Tensor]) -> bytes:
    header: dict[str, Any] = {"__metadata__": {_KEY: metadata}}
    start = 0
    for name, tensor in tensors.items():
        end = start + tensor.nbytes
        header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(header, ensure_ascii=False).encode()
    return text + b" " * (-len(text) % 8)


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    crc = zlib.crc32(text.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        crc = zlib.crc32(_bytes(tensor), crc)
    return f"{crc:08x}"


def _read_metadata(file: IO[bytes]) -> str:
    """Return the metadata of this project. The file has as many bytes as its header says."""
    size = os.fstat(file.fileno()).st_size
    start = file.read(8)
    length = int.from_bytes(start, "little")
    if len(start) < 8 or length > size - 8:
        if start.startswith((b"PK\3\4", b"\x80")):
            raise BadFileError("it is a pickle, as torch.save and older versions of this project write it; not opened")
        raise BadFileError("it is no safetensors file, or was cut off")
    if length > MAX_HEADER_BYTES:
        raise BadFileError(f"its header has more than {MAX_HEADER_BYTES} bytes")
    header = json.loads(file.read(length))
    if not isinstance(header, dict):
        raise BadFileError("it is no safetensors file")
    metadata = header.pop("__metadata__", None)
    if not isinstance(metadata, dict) or not isinstance(metadata.get(_KEY), str):
        raise BadFileError("it is a safetensors file, but not of this project")
    end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    if 8 + length + end != size:
        raise BadFileError(f"it has {size} bytes, and its header speaks of {8 + length + end}")
    text: str = metadata[_KEY]
    return text


def _read_tensors(file: IO[bytes]) -> dict[str, Tensor]:
    whole = file.read()
    bytearray(len(whole))  # MemoryError where a second copy does not fit: safetensors would panic
    return safetensors.torch.load(whole)


def _read_tree(text: str, tensors: dict[str, Tensor], format: str) -> Any:
    crc, _, text = text.partition(" ")
    if crc != _checksum(text, tensors):
        raise BadFileError("its checksum is wrong")
    content = json.loads(text, parse_int=_int64)
    if not isinstance(content, dict) or content.keys() != {"format", "tree"}:
        raise BadFileError("it is a safetensors file, but not of this project")
    if content["format"] != format:
        raise BadFileError(f"it is a file of format {content['format']!r}, not {format!r}")
    return _from_json(content["tree"], _Shared(tensors))


def _int64(digits: str) -> int:
    value = int(digits)
    if not _is_int64(value):
        raise BadFileError("it holds an integer of more than 64 bits")
    return value
