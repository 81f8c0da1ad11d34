"""Model files that would run a command, by name, each with what generate.py must say of it; and tools to make such."""

import builtins
import io
import os
import pathlib
import pickle
import shutil
import struct
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lm.model.model_file import FORMAT
from programs import WORDS, make_model


class HostileFile(NamedTuple):
    """Bytes, or how to make them for a canary (a path that executing them would make), and the words of the refusal."""

    make: Callable[[Path], bytes]
    said: str


class Call:
    """Unpickling this calls `function`."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def archive(pickled: bytes, *storages: bytes, **records: bytes) -> bytes:
    """The zip format of torch.save around any pickle, with right checksums."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", b"little")
        for i, storage in enumerate(storages):
            file.writestr(f"archive/data/{i}", storage)
        for name, content in ({"version": b"3\n"} | records).items():
            file.writestr(f"archive/{name}", content)
    return out.getvalue()


def saved(content: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    out = io.BytesIO()
    torch.save(content, out, **options)
    return out.getvalue()


def model_content(**replaced: Any) -> dict[str, Any]:
    """What `save_model` saves, with parts of it replaced."""
    model = make_model()
    whole = {"format": FORMAT, "options": model.options, "vocabulary": WORDS, "weights": model.state_dict()}
    return whole | replaced


def rewritten(whole: bytes, change: Callable[[str, bytes], tuple[str, bytes] | None], **options: Any) -> bytes:
    """The archive `whole` with each record changed, or left out."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(whole)) as before, zipfile.ZipFile(out, "w", **options) as after:
        for name in before.namelist():
            if record := change(name, before.read(name)):
                after.writestr(*record)
    return out.getvalue()


# --- pickles by hand: only they can say what no honest program would


def text(value: str) -> bytes:
    """Push a str."""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def integer(value: int) -> bytes:
    """Push an int."""
    encoded = pickle.encode_long(value)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def storage(kind: str, numel: bytes, key: str = "0") -> bytes:
    """Push a storage."""
    return b"(" + text("storage") + f"ctorch\n{kind}\n".encode() + text(key) + text("cpu") + numel + b"tQ"


def tensor(size: str | tuple[int, ...], stride: tuple[int, ...] = (1,), **more: Any) -> bytes:
    """Push a tensor; `more`: kind, numel, key, offset, hooks, function."""
    numel = more.get("numel", integer(4))
    function = more.get("function", b"ctorch._utils\n_rebuild_tensor_v2\n")
    shape = text(size) if isinstance(size, str) else b"(" + b"".join(map(integer, size)) + b"t"
    strides = b"(" + b"".join(map(integer, stride)) + b"t"
    hooks = more.get("hooks", b"ccollections\nOrderedDict\n)R")
    body = storage(more.get("kind", "FloatStorage"), numel, more.get("key", "0"))
    return function + b"(" + body + more.get("offset", integer(0)) + shape + strides + b"\x89" + hooks + b"tR"


def program(*parts: bytes) -> bytes:
    """A pickle of protocol 2."""
    return b"\x80\x02" + b"".join(parts) + b"."


FOUR = struct.pack("4f", 1, 2, 3, 4)


def _commands(canary: Path) -> dict[str, Call]:
    path = str(canary)
    code = f"__import__('pathlib').Path({path!r}).touch()"
    inner = pickle.dumps(Call(pathlib.Path.touch, canary))
    return {
        "os.system": Call(os.system, f"touch {path}"),
        "subprocess.call": Call(subprocess.call, ["touch", path]),
        "builtins.eval": Call(builtins.eval, code),
        "builtins.exec": Call(builtins.exec, code),
        "pathlib": Call(Path.touch, canary),
        "os.mkdir": Call(os.mkdir, path),
        "shutil.copyfile": Call(shutil.copyfile, __file__, path),
        "pickle.loads": Call(pickle.loads, inner),
        "torch.save": Call(torch.save, 3, path),
        "torch.storage._load_from_bytes": Call(torch.storage._load_from_bytes, saved(Call(Path.touch, canary))),
    }


_FORMS: dict[str, tuple[Callable[[Any], bytes], str]] = {
    "zip": (lambda content: archive(pickle.dumps(content, 2)), "which no model needs"),
    "zip, protocol 4": (lambda content: archive(pickle.dumps(content, 4)), "pickle is of protocol 4"),
    "old torch format": (
        lambda content: saved(content, _use_new_zipfile_serialization=False),
        "does not end as a file",
    ),
    "bare pickle": (pickle.dumps, "does not end as a file"),
    "in a model": (lambda content: saved(model_content(options={"kind": content})), "which no model needs"),
}


def _in_front(canary: Path) -> bytes:
    call = b"cposix\nsystem\n" + text(f"touch {canary}") + b"\x85R0"
    return rewritten(
        saved(model_content()),
        lambda name, old: (name, old[:2] + call + old[2:] if name.endswith("data.pkl") else old),
    )


COMMANDS: dict[str, HostileFile] = {
    f"{command}, {form}": HostileFile(lambda canary, c=command, w=write: w(_commands(canary)[c]), said)
    for command in _commands(Path("canary"))
    for form, (write, said) in _FORMS.items()
} | {
    "a command before a working model": HostileFile(_in_front, "names 'posix.system'"),
    "INST": HostileFile(
        lambda canary: archive(program(b"(", text(f"touch {canary}"), b"iposix\nsystem\n")), "instruction INST"
    ),
    "OBJ": HostileFile(
        lambda canary: archive(program(b"(cposix\nsystem\n", text(f"touch {canary}"), b"o")), "'posix.system'"
    ),
    "STACK_GLOBAL": HostileFile(
        lambda canary: archive(program(text("posix"), text("system"), b"\x93", text(f"touch {canary}"), b"\x85R")),
        "instruction STACK_GLOBAL",
    ),
}
"""Each makes the canary when it is loaded without care."""
