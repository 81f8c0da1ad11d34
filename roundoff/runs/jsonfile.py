"""Read and write files that hold a JSON object, such as config.json. The reader trusts none."""

import json
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from roundoff.errors import UsageError, described, printable
from roundoff.runs.files import write_atomically
from roundoff.runs.json_text import scalar, to_json

MAX_BYTES = 2**20
"""Limit for config.json and result.json, which hold a few kilobytes. Parsed, JSON can take 70 times its size."""

MAX_DEPTH = 20

RUN_DIRECTORY = "give a run directory"


def require_file(path: Path, wanted: str = RUN_DIRECTORY) -> None:
    """Raise UsageError, which ends in `wanted`, unless `path` is a regular file, or a link to one.

    To open a pipe would wait for its writer.
    """
    if not path.is_file():
        what = "this is no file" if path.exists() else "there is no such file"
        raise UsageError(f"{printable(path)}: {what}; {wanted}")


def read_object(path: Path, max_bytes: int = MAX_BYTES, wanted: str = RUN_DIRECTORY) -> dict[str, Any]:
    """Return the JSON object in a file. Such files are written whole or not at all, so a broken one is refused.

    Raises:
        UsageError: there is no such file (then it ends in `wanted`), or something else is in it.
        OSError: it cannot be read.
    """
    require_file(path, wanted)
    with path.open("rb") as file:
        text = file.read(max_bytes + 1)
    if len(text) > max_bytes:
        raise UsageError(f"{printable(path)} has more than {max_bytes} bytes; no program of this project wrote it")
    try:
        content = _clean(json.loads(text.decode()))
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{printable(path)} cannot be read as JSON ({reason(error)})") from None
    if not isinstance(content, dict):
        raise UsageError(f"{printable(path)} holds {reprlib.repr(content)}, not an object")
    return content


def _clean(value: Any, depth: int = 0) -> Any:
    """Return `value` without lone surrogates, which no file or terminal takes; refuse more than `MAX_DEPTH` levels."""
    if depth > MAX_DEPTH:
        raise ValueError(f"nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_clean(v, depth + 1) for v in value]
    if isinstance(value, dict):
        return {_clean(k): _clean(v, depth + 1) for k, v in value.items()}
    return value


def reason(error: Exception) -> str:
    """Return in short why JSON cannot be read."""
    return "nested too deep" if isinstance(error, RecursionError) else printable(error, 80)


def write_json(path: Path, content: Any, indent: int) -> None:
    """Write `content` to `path`, whole or not at all.

    Raises:
        OSError: `path` cannot be written.
    """
    # A path that is not UTF-8 has lone surrogates; backslashreplace makes the escapes of them that JSON has.
    text = (to_json(content, indent=indent) + "\n").encode("utf-8", "backslashreplace")
    write_atomically(path, lambda file: file.write(text))


def as_read_back(value: Any) -> Any:
    """Return what a reader of `to_json(value)` gets, to be compared with the content of a file."""
    return json.loads(to_json(value))


def unwritable(value: Any, name: str, depth: int = 1) -> str | None:
    """Return a sentence on what in `value` no file of a run can hold, and what to give; None where all of it can be.

    Args:
        value: what is to be written.
        name: of the value, with which the sentence begins.
        depth: how many objects of the file are around it.
    """
    value = scalar(value)
    if depth > MAX_DEPTH:
        return f"{printable(name)} is nested more than {MAX_DEPTH} deep; give a flatter one"
    if isinstance(value, Mapping):
        found = (unwritable(entry, f"{name}.{key}", depth + 1) for key, entry in value.items())
        return next(filter(None, found), None)
    if isinstance(value, list | tuple):
        found = (unwritable(entry, f"{name}[{i}]", depth + 1) for i, entry in enumerate(value))
        return next(filter(None, found), None)
    if value is None or isinstance(value, bool | int | float | str | Path):
        return None
    return f"{printable(name)} is {described(value)}; give {_instead(value)}"


def _instead(value: Any) -> str:
    if isinstance(value, complex) or hasattr(value, "shape"):
        return "numbers"
    if isinstance(value, set | frozenset):
        return "a list"
    if hasattr(value, "__dict__") and not callable(value):  # such as an argparse.Namespace
        return "a mapping, such as vars(args)"
    return "a number, a text, a list or a mapping"
