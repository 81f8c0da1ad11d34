"""The one reader of files that hold tensors. Nothing in a file is executed, believed or built before it was checked."""

import io
import stat
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from roundoff.errors import BadFileError, printable
from roundoff.runs.pickle_check import MAX_VALUES, PickleCheck

MAX_DEPTH = 20
MAX_DIRECTORY_BYTES = 2**20
"""Of the archive's table of contents; each tensor takes about 70."""

_PLAIN = {"data.pkl", "byteorder", "version", ".format_version", ".storage_alignment", ".data/serialization_id"}
_TAIL_BYTES = 98
"""Of the three records that end an archive; see section 4.3 of the zip specification (APPNOTE.TXT)."""


def load_tensors(path: Path) -> Any:
    """What `torch.save` wrote into a file.

    It is made of dict, OrderedDict, list, tuple, str, int, float, bool, None and dense tensors on the CPU, whose
    checksums are right. Takes memory for about three copies of the file at most, good or bad, and for its pickle
    (of up to 16 MiB) 30 times as much.

    Raises:
        FileNotFoundError: there is no such file.
        BadFileError: it is something else, was damaged, or is made to do harm. The text is one line of up to 150
            characters.
        MemoryError: so large a file does not fit.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would be waited for
            raise BadFileError("it is no regular file")
        with path.open("rb") as file:
            content = torch.load(_checked_copy(file), map_location="cpu", weights_only=True)
        _check_content(content)
    except (FileNotFoundError, MemoryError):
        raise
    except BadFileError as error:
        raise BadFileError(printable(error, 150)) from None
    except OSError as error:
        raise BadFileError(printable(f"it cannot be read: {error.strerror or error}", 150)) from None
    except Exception as error:  # the readers of a damaged file can fail in any way
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise BadFileError(printable(reason, 150)) from None
    return content


def _checked_copy(file: IO[bytes]) -> IO[bytes]:
    """An archive in memory with the checked records of `file`.

    Python and torch read archives each in their own way, and in a malicious one could find different records.
    """
    _check_directory(file)
    copy = io.BytesIO()
    with zipfile.ZipFile(file) as archive, zipfile.ZipFile(copy, "w") as checked:
        sizes = _record_sizes(archive, file.seek(0, io.SEEK_END))
        root = next(iter(sizes), "").partition("/")[0]
        storages = {name.rpartition("/")[2]: n for name, n in sizes.items() if name.startswith(f"{root}/data/")}
        # zipfile compares each record that it reads to the end with its CRC-32; torch does not.
        PickleCheck(storages).run(archive.read(f"{root}/data.pkl"))
        for name in sizes:
            checked.writestr(name, archive.read(name))
    copy.seek(0)
    return copy


def _check_directory(file: IO[bytes]) -> None:
    """Bound the memory that zipfile takes for the table of contents, a multiple of what that has in the file."""
    start = max(0, file.seek(0, io.SEEK_END) - _TAIL_BYTES)
    file.seek(start)
    tail = file.read(_TAIL_BYTES)
    if tail[-22:-18] != b"PK\5\6" or tail[-2:] != b"\0\0":  # a comment could hide another end
        raise BadFileError("it does not end as a file of torch.save does; it may have been cut off")
    size = int.from_bytes(tail[-10:-6], "little")
    if tail[-42:-38] == b"PK\6\7":  # the same in 64 bits, which zipfile prefers
        size = max(size, int.from_bytes(tail[-58:-50], "little"))
    if size > MAX_DIRECTORY_BYTES:
        raise BadFileError(f"its table of contents has more than {MAX_DIRECTORY_BYTES} bytes")


def _record_sizes(archive: zipfile.ZipFile, limit: int) -> dict[str, int]:
    """Bytes of each record by its name; altogether they may have `limit`."""
    sizes: dict[str, int] = {}
    for record in archive.infolist():
        root, _, name = record.filename.partition("/")
        number = name.removeprefix("data/")
        if name not in _PLAIN and not (number != name and number.isascii() and number.isdecimal()):
            raise BadFileError(f"it holds a record {record.filename!r}, which torch.save does not write")
        if not root or not next(iter(sizes), record.filename).startswith(f"{root}/"):
            raise BadFileError("its records are not all in one folder")
        if record.filename in sizes:
            raise BadFileError(f"it holds the record {record.filename!r} twice")
        if record.compress_type != zipfile.ZIP_STORED or record.file_size != record.compress_size:
            raise BadFileError(f"its record {record.filename!r} is compressed, which torch.save does not do")
        sizes[record.filename] = record.file_size
    if sum(sizes.values()) > limit:
        raise BadFileError("its records overlap, or go on past its end")
    return sizes


def _check_content(content: Any) -> None:
    todo = [(content, 0)]
    count = 0
    while todo:
        value, depth = todo.pop()
        count += 1  # one value may stand in many places
        if depth > MAX_DEPTH:
            raise BadFileError(f"it is nested more than {MAX_DEPTH} deep")
        if count > MAX_VALUES:
            raise BadFileError(f"it holds more than {MAX_VALUES} values")
        inside: list[Any] = []
        if type(value) in (dict, OrderedDict):
            inside = [*value.values(), *getattr(value, "__dict__", {}).values()]
        elif type(value) in (list, tuple):
            inside = value
        elif type(value) is Tensor:
            _check_tensor(value)
        elif type(value) not in (str, int, float, bool, type(None)):
            raise BadFileError(f"it holds a value of type {type(value).__name__}")
        todo.extend((v, depth + 1) for v in inside)


def _check_tensor(tensor: Tensor) -> None:
    """Again what `PickleCheck` has ensured, of what torch made."""
    storage = tensor.untyped_storage() if tensor.layout is torch.strided and tensor.device.type == "cpu" else None
    if storage is None or tensor.is_quantized or tensor.is_complex() or tensor._backward_hooks:
        raise BadFileError("it holds a tensor that is not a dense one of real numbers")
    if tensor.numel() * tensor.element_size() > storage.nbytes():
        raise BadFileError("it holds a tensor of more elements than its storage has")
