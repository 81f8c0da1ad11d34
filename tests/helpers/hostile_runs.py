"""Run directories made to do harm, by name, each with what compare.py must say of it."""

import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple


class HostileRun(NamedTuple):
    """How to spoil a good run directory, and the words of the refusal."""

    spoil: Callable[[Path], object]
    said: str


def holds(name: str, content: bytes | str) -> Callable[[Path], object]:
    """The file has this content."""
    data = content.encode() if isinstance(content, str) else content
    return lambda run: (run / name).write_bytes(data)


def field(name: str, key: str, value: Any) -> Callable[[Path], object]:
    """A field of the file, or of its last row, has this value."""

    def spoil(run: Path) -> None:
        *rows, last = (run / name).read_text().splitlines() if name.endswith("l") else [(run / name).read_text()]
        (run / name).write_text("\n".join([*rows, json.dumps(json.loads(last) | {key: value})]))

    return spoil


def row(name: str, line: bytes) -> Callable[[Path], object]:
    """The first line of the file is this one."""
    return lambda run: (run / name).write_bytes(line + b"\n" + (run / name).read_bytes())


def instead(name: str, make: Callable[[Path], object]) -> Callable[[Path], object]:
    """Something that is no file has the file's name."""
    return lambda run: ((run / name).unlink(), make(run / name))


def loop(path: Path) -> None:
    """A link to itself."""
    path.symlink_to(path.name)


def zero(path: Path) -> None:
    """A link to a device without end."""
    path.symlink_to("/dev/zero")


JUNK = random.Random(2).randbytes(3000)
DEEP = b"[" * 60_000

RUNS: dict[str, HostileRun] = {
    **{
        f"{name} is {what}": HostileRun(instead(name, make), f"{name}: {said}")
        for name in ("config.json", "steps.jsonl")
        for what, make, said in (
            ("a directory", Path.mkdir, "this is no file"),
            ("a pipe", os.mkfifo, "this is no file"),
            ("a device", zero, "this is no file"),
            ("a link to itself", loop, "there is no such file"),
        )
    },
    **{
        f"{name} is {what}": HostileRun(holds(name, content), said)
        for name in ("config.json", "result.json")
        for what, content, said in (
            ("empty", "", "cannot be read as JSON"),
            ("null", "null", "holds None, not an object"),
            ("a list", "[]", r"holds \[\], not an object"),
            ("a number", "1e999", "holds inf, not an object"),
            ("a text", '"\\u001b[2J"', r"holds '\\x1b\[2J', not an object"),
            ("NaN", "NaN", "holds nan, not an object"),
            ("junk", JUNK, "cannot be read as JSON"),
            ("in UTF-16", "{}".encode("utf-16"), "cannot be read as JSON"),
            ("with a byte order mark", "\ufeff{}", "cannot be read as JSON"),
            ("deep", DEEP, r"nested too deep"),
            ("not that deep", '{"a":' * 30 + "1" + "}" * 30, "nested more than 20 deep"),
            ("a number of 5000 digits", "1" * 5000, "cannot be read as JSON"),
            ("far too large", b" " * (2**20 + 1), "has more than 1048576 bytes"),
        )
    },
    **{
        f"a row of {name} is {what}": HostileRun(row(name, line), said)
        for name in ("steps.jsonl", "epochs.jsonl")
        for what, line, said in (
            ("empty", b"", "line 1 cannot be read as JSON"),
            ("null", b"null", "line 1 is None, where an object belongs"),
            ("a list", b"[1, 2]", r"line 1 is \[1, 2\]"),
            ("an empty object", b"{}", "line 1: field (step|epoch) is missing"),
            ("two objects", b"{}{}", "cannot be read as JSON"),
            ("junk", JUNK.replace(b"\n", b" "), "cannot be read as JSON"),
            ("zeros", bytes(5000), "cannot be read as JSON"),
            ("a number of 5000 digits", b"1" * 5000, "cannot be read as JSON"),
            ("deep", DEEP, "nested too deep"),
            ("without end", b'{"step":' + b" " * 70_000, "has more than 65536 bytes"),
        )
    },
    **{
        f"{key} in {name} is {value!r:.20}": HostileRun(field(name, key, value), f"field {key} is ")
        for name, key, value in (
            ("config.json", "seed", "1111"),
            ("config.json", "seed", True),
            ("config.json", "seed", 2**63),
            ("config.json", "seed", 1e300),
            ("config.json", "job", "text"),
            ("config.json", "job", None),
            ("config.json", "precision", ["fp32"]),
            ("config.json", "environment", []),
            ("result.json", "status", "done"),
            ("result.json", "status", {"finished": 1}),
            ("result.json", "test_loss", "low"),
            ("result.json", "test_loss", 1e39),
            ("result.json", "steps", -1),
            ("result.json", "peak_memory_bytes", 1e9),
            ("steps.jsonl", "loss", None),
            ("steps.jsonl", "loss", [6.0]),
            ("steps.jsonl", "loss", 1e308),
            ("steps.jsonl", "loss", 10**400),
            ("steps.jsonl", "step", 1.0),
            ("steps.jsonl", "step", 2**63),
            ("steps.jsonl", "step", {}),
            ("steps.jsonl", "applied", 1),
            ("steps.jsonl", "loss_scale", "2**16"),
            ("steps.jsonl", "loss_scale", 1e300),
            ("epochs.jsonl", "valid_loss", "\u001b[2J"),
            ("epochs.jsonl", "valid_loss", -1e39),
            ("epochs.jsonl", "epoch", False),
            ("epochs.jsonl", "seconds", {}),
        )
    },
    "no config.json": HostileRun(lambda run: (run / "config.json").unlink(), "there is no such file"),
    "no steps": HostileRun(holds("steps.jsonl", b""), "a run of no steps"),
    **{
        f"precision {value}": HostileRun(field("config.json", "precision", value), said)
        for value, said in (
            ({}, "field precision.mode is missing, where a text"),
            ({"mode": None}, "field precision.mode is None, where a text"),
            ({"mode": "m", "loss_scale": "2**7"}, "field precision.loss_scale is "),
            ({"mode": "m", "dtype": 16}, "field precision.dtype is 16"),
            ({"mode": "m", "equals": "fp32"}, "field precision.equals is 'fp32', where a list of texts"),
            ({"mode": "m", "equals": [1]}, "field precision.equals is "),
        )
    },
    "of an older version": HostileRun(
        holds("config.json", '{"script": "main", "seed": 1}'), "field job is missing: an "
    ),
}
