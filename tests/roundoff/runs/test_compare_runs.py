"""Reading a run directory: what was written is read, and whatever else is there gets one clear line."""

import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from fuzzing import byte_changes, fuzz
from lm.options.modes import MODES
from programs import ROOT
from roundoff.errors import UsageError, printable
from roundoff.report.summary import table
from roundoff.runs import reading
from roundoff.runs.jsonfile import read_object
from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare_runs
from synthetic import LOSSES, change_json, make_config, make_run

FILES = ("config.json", "result.json", "steps.jsonl", "epochs.jsonl")
Spoil = Callable[[Path], object]


def refusal(path: Path, read: Callable[[Path], object] = read_run) -> str:
    """The one line that `path` gets."""
    with pytest.raises(UsageError) as error:
        read(path)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 700
    return text


@pytest.mark.parametrize("label", MODES)
def test_what_was_written_is_read(tmp_path: Path, label: str) -> None:
    path = make_run(tmp_path / "run", label, 7, applied=[True] * 7 + [False], test_loss=4.5)
    run = read_run(path)
    assert (run.path, run.label, run.seed, run.status, run.problems) == (path, label, 7, "finished", [])
    assert run.config == make_config(label, 7)
    assert (run.job, run.dtype, run.equals) == (run.config["job"], MODES[label].dtype, list(MODES[label].equals))
    scale = {"fp16-optimizer-dynamic": None, "amp-fp16": None, "manual": 128.0, "fp16-optimizer": 128.0}.get(label, 1.0)
    assert (run.loss_scale, run.device) == (scale, "A CPU x 2")
    assert run.steps == {
        "step": [1, 2, 3, 4, 5, 6, 7, 8],
        "epoch": [1, 1, 1, 1, 2, 2, 2, 2],
        "loss": LOSSES,
        "grad_norm": [0.25] * 7 + [math.inf],
        "loss_scale": [scale or 65536.0] * 8,
        "applied": [True] * 7 + [False],
        "lr": [20.0] * 8,
    }
    assert [row["valid_loss"] for row in run.epochs] == [6.125, 5.125]
    assert run.result is not None
    assert (run.result["test_loss"], run.result["steps"], run.result["skipped"]) == (4.5, 8, 1)


def test_a_run_of_any_loop_is_read(tmp_path: Path) -> None:
    """With the least that each file must have, and with fields that nobody knows."""
    path = make_run(tmp_path / "run", losses=[6.0, math.nan, math.inf, -math.inf])
    config = {"job": {}, "precision": {"mode": "mine"}, "seed": 0, "environment": {}, "future": {"a": [1]}}
    (path / "config.json").write_text(json.dumps(config))
    (path / "epochs.jsonl").write_text('{"epoch": 1, "valid_loss": 0, "lr": "nan", "seconds": 1, "future": []}')
    (path / "result.json").write_text('{"status": "finished", "steps": 4, "skipped": 0, "future": "<b>"}')
    run = read_run(path)
    assert (run.label, run.job, run.loss_scale, run.dtype, run.equals) == ("mine", {}, 1.0, None, [])
    assert (run.device, run.config["future"], run.problems) == ("a device without a name", {"a": [1]}, [])
    assert [str(loss) for loss in run.steps["loss"]] == ["6.0", "nan", "inf", "-inf"]
    assert ("valid_ppl" in run.epochs[0], run.test_loss, run.loss_unit, run.length) == (False, None, None, [])
    assert "future" not in run.epochs[0] | (run.result or {})


def test_a_trainer_run_is_read(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.run(monkeypatch, corpus, tmp_path / "run", "main_amp", "--max-steps", "6", "--clip", "inf") == 0
    run, rows = read_run(tmp_path / "run"), jobs.rows(tmp_path / "run")
    assert (run.label, run.status, run.problems, run.job["clip"]) == ("amp-fp16", "finished", [], "inf")
    assert run.steps["loss"] == [float(row["loss"]) for row in rows]
    assert run.steps["applied"] == [row["applied"] for row in rows]
    assert len(rows) == 6
    assert (run.config["loss_unit"], run.loss_unit) == ("nats a word", "nats a word")
    assert run.length == ["epochs", "max_steps", "dry_run"]


@pytest.mark.parametrize("status", [None, "interrupted", "diverged"])
def test_a_run_that_has_not_finished(tmp_path: Path, status: str | None) -> None:
    run = read_run(make_run(tmp_path / "run", status=status, test_loss=None))
    assert (run.status, (run.result or {"test_loss": None})["test_loss"]) == (status or "unfinished", None)


@pytest.mark.parametrize("kept", [0, 1, 30, -2, -1, None])
def test_a_last_line_that_is_cut_is_passed_over(tmp_path: Path, kept: int | None) -> None:
    path = make_run(tmp_path / "run", status=None)
    lines = (path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (path / "steps.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    run = read_run(path)
    whole = kept in (-1, None)  # without its newline, a line is whole too
    assert run.steps["loss"] == (LOSSES if whole else LOSSES[:-1])
    note = ["the last line of steps.jsonl is cut off, and is passed over"]
    assert run.problems == ([] if whole or kept == 0 else note)


NO_STEP = "steps.jsonl has no step {}, though it goes to {}"
REPEATS = "steps.jsonl repeats step {}: of {} rows, the last of each step counts"
SORTED = "steps.jsonl is not in the order of its steps, and was sorted"


@pytest.mark.parametrize(
    ("order", "losses", "problems"),
    [
        ([1, 2, 2, 3], [0, 2, 3], [REPEATS.format(2, 4)]),
        ([2, 1, 3], [1, 0, 2], [SORTED]),
        ([1, 2, 4], [0, 1, 2], [NO_STEP.format(3, 4)]),
        ([3], [0], [NO_STEP.format(1, 3)]),
        ([1, 2**62], [0, 1], [NO_STEP.format(2, 2**62)]),
        ([1, 2, 1], [2, 1], [REPEATS.format(1, 3), SORTED]),
    ],
)
def test_steps_repeated_or_out_of_order(
    tmp_path: Path, order: list[int], losses: list[int], problems: list[str]
) -> None:
    path = make_run(tmp_path / "run", status=None, losses=[float(i) for i in range(len(order))])
    rows = [json.loads(line) for line in (path / "steps.jsonl").read_text().splitlines()]
    rows = [row | {"step": step} for row, step in zip(rows, order, strict=True)]
    (path / "steps.jsonl").write_text("\n".join(map(json.dumps, rows)))
    run = read_run(path)
    assert (run.steps["step"], run.steps["loss"], run.problems) == (sorted(set(order)), losses, problems)


def test_what_is_noted_of_the_other_files(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    change_json(path / "result.json", steps=9)
    (path / "epochs.jsonl").unlink()
    run = read_run(path)
    assert run.epochs == []
    assert run.problems == ["epochs.jsonl is missing", "result.json counts 9 steps, steps.jsonl has 8"]


def test_lone_surrogates_do_not_survive(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "config.json").write_text(json.dumps(make_config() | {"data": "\ud800", "precision": {"mode": "\udfff"}}))
    run = read_run(path)
    assert (run.config["data"], run.label) == ("?", "?")


def test_a_directory_or_a_file_that_is_missing(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: there is no such directory" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: this is no directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'config.json'}: there is no such file" in refusal(tmp_path / "empty")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    assert refusal(tmp_path / "a\nb\x1b").startswith(f"{tmp_path}/a\\nb\\x1b: there is no such directory")


# What is made to do harm: a name, the file, what becomes of it, and what is said.


def content(data: bytes) -> Spoil:
    return lambda path: path.write_bytes(data)


def first_line(line: bytes) -> Spoil:
    return lambda path: path.write_bytes(line + b"\n" + path.read_bytes())


def instead(make: Spoil) -> Spoil:
    return lambda path: (path.unlink(), make(path))


def field(name: str, value: Any) -> Spoil:
    """The field of the object, or of the third row, has this value."""

    def spoil(path: Path) -> None:
        rows = [json.loads(row) for row in path.read_text().splitlines()] if path.suffix == ".jsonl" else []
        target = rows[min(2, len(rows) - 1)] if rows else json.loads(path.read_text())
        inner = target
        for part in name.split(".")[:-1]:
            inner = inner[part]
        inner[name.split(".")[-1]] = value
        path.write_text("\n".join(map(json.dumps, rows or [target])))

    return spoil


JUNK, DEEP, LONG = random.Random(2).randbytes(3000), b"[" * 60_000, b"1" * 5000
NO_FILE, NO_JSON, NUMBER = "this is no file", "cannot be read as JSON", 'a number, "inf", "-inf" or "nan"'
NODES: list[tuple[str, Spoil, str]] = [
    ("gone", Path.unlink, "there is no such file"),
    ("a directory", instead(Path.mkdir), NO_FILE),
    ("a pipe", instead(os.mkfifo), NO_FILE),
    ("a device", instead(lambda path: path.symlink_to("/dev/zero")), NO_FILE),
    ("a link to itself", instead(lambda path: path.symlink_to(path.name)), "there is no such file"),
]
OBJECTS: list[tuple[str, bytes, str]] = [
    ("empty", b"", NO_JSON), ("null", b"null", "holds None, not an object"), ("a list", b"[]", "holds [], not"),
    ("a number", b"1e999", "holds inf, not an object"), ("NaN", b"NaN", "holds nan, not an object"),
    ("a text", b'"\\u001b[2J"', r"holds '\x1b[2J', not an object"), ("cut", b"{", NO_JSON), ("junk", JUNK, NO_JSON),
    ("in UTF-16", "{}".encode("utf-16"), NO_JSON), ("with a mark", b"\xef\xbb\xbf{}", NO_JSON),
    ("deep", DEEP, "nested too deep"), ("30 deep", b'{"a":' * 30 + b"1" + b"}" * 30, "nested more than 20 deep"),
    ("5000 digits", LONG, NO_JSON), ("far too large", b" " * (2**20 + 1), "has more than 1048576 bytes"),
]  # fmt: skip
LINES: list[tuple[str, bytes, str]] = [
    ("empty", b"", "line 1 cannot be read as JSON"), ("null", b"null", "line 1 is None, where an object belongs"),
    ("a list", b"[1, 2]", "line 1 is [1, 2], where an object"), ("a text", b'"x"', "line 1 is 'x', where an object"),
    ("an empty object", b"{}", " is missing, where a whole number belongs"), ("two objects", b"{}{}", NO_JSON),
    ("junk", JUNK.replace(b"\n", b" "), NO_JSON), ("zeros", bytes(5000), NO_JSON), ("cut", b"{", NO_JSON),
    ("5000 digits", LONG, NO_JSON), ("deep", DEEP, "nested too deep"), ("no UTF-8", b"\xff\xfe", NO_JSON),
    ("without end", b'{"step":' + b" " * 70_000, "has more than 65536 bytes"),
]  # fmt: skip
VALUES: dict[str, list[tuple[str, Any, str]]] = {
    "config.json": [
        *[("seed", value, "a whole number") for value in ("1111", True, 2**63, 1e300, -1, None)],
        *[("job", value, "an object") for value in ("text", None, [])],
        *[("precision", value, "an object") for value in (["fp32"], None)],
        ("environment", [], "an object"), ("loss_unit", 3, "a text, or null"),
        ("length", "epochs", "a list of texts, or null"),
        ("precision.mode", None, "a text"), ("precision.mode", ["fp32"], "a text"),
        ("precision.loss_scale", "2**7", f"{NUMBER}, or null"), ("precision.dtype", 16, "a text, or null"),
        ("precision.equals", "fp32", "a list of texts, or null"), ("precision.equals", [1], "a list of texts, or null"),
    ],
    "result.json": [
        *[("status", v, '"finished" or "interrupted" or "diverged"') for v in ("done", {"finished": 1}, [])],
        *[("test_loss", value, f"{NUMBER}, or null") for value in ("low", False)],
        ("test_loss", 1e39, "a number that a float32 can hold, or null"), ("steps", -1, "a whole number"),
        ("steps", None, "a whole number"), ("peak_memory_bytes", 1e9, "a whole number, or null"),
    ],
    "steps.jsonl": [
        *[("loss", value, NUMBER) for value in (None, True, "6.5", [6.0], [[[[[[[[1]]]]]]]], 10**400, "\x1b[2J")],
        ("loss", 1e308, "a number that a float32 can hold"), ("loss_scale", 1e300, "a number that a float32 can hold"),
        ("loss_scale", "2**16", NUMBER), ("grad_norm", "\x1b[2J", NUMBER), ("applied", 1, "true or false"),
        *[("step", value, "a whole number") for value in (1.0, 1.5, -1, 2**63, {})],
        *[("losses", value, "an object") for value in ("kl", [1.0], 1)], ("losses", {"kl": "low"}, NUMBER),
        ("losses", {str(i): i for i in range(17)}, "an object of at most 16 losses"),
        ("losses", {"kl": 1e39}, "a number that a float32 can hold"),
    ],
    "epochs.jsonl": [
        ("valid_loss", "\x1b[2J", NUMBER), ("valid_loss", -1e39, "a number that a float32 can hold"),
        ("epoch", False, "a whole number"), ("seconds", {}, NUMBER), ("valid_ppl", "low", f"{NUMBER}, or null"),
    ],
}  # fmt: skip
HARM: dict[str, tuple[str, Spoil, str]] = {
    **{f"{file} is {what}": (file, make, f"{file}: {said}") for file in FILES[::2] for what, make, said in NODES},
    **{f"{file} is {what}": (file, content(data), said) for file in FILES[:2] for what, data, said in OBJECTS},
    **{f"a row of {file} is {w}": (file, first_line(data), said) for file in FILES[2:] for w, data, said in LINES},
    **{
        f"{name} in {file} is {value!r:.20}": (file, field(name, value), f", where {said} belongs")
        for file, values in VALUES.items()
        for name, value, said in values
    },
    "no steps": ("steps.jsonl", content(b""), "is a run of no steps: there is nothing to compare; let it train longer"),
    "half a step": ("steps.jsonl", content(b'{"step": 1, "ep'), "is a run of no steps"),
    "of an older version": (
        "config.json",
        content(b'{"script": "main", "seed": 1}'),
        "config.json: field job is missi",
    ),
    "no mode": ("config.json", field("precision", {}), "config.json: field precision.mode is missing, where a text"),
}


@pytest.mark.parametrize("case", HARM)
def test_harm_gets_one_line(tmp_path: Path, case: str) -> None:
    path = make_run(tmp_path / "run")
    file, spoil, said = HARM[case]
    spoil(path / file)
    text = refusal(path)
    assert said in text
    assert text.startswith(str(path))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def json_changes(draw: st.DrawFn, whole: bytes) -> bytes:
    """A file whose object, or one of whose rows, has any value in any place, also one inside another."""
    rows = [json.loads(line) for line in whole.splitlines()] if whole[:2] == b'{"' else [json.loads(whole)]
    inner = draw(st.sampled_from(rows))
    while True:
        name = draw(st.sampled_from(sorted(inner)))
        if not (isinstance(inner[name], dict) and inner[name] and draw(st.booleans())):
            break
        inner = inner[name]
    inner[name] = draw(json_values)
    return "\n".join(map(json.dumps, rows)).encode()


def outcome(path: Path) -> Any:
    """What comes of reading the run: all of it, or the refusal."""
    try:
        run = read_run(path)
    except UsageError as error:
        return str(error)
    return str((run.steps, run.epochs, run.losses, run.problems))  # nan equals nan as text


@fuzz(200)
@given(st.data())
def test_files_read_in_bulk_are_those_read_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever is in them, and wherever a piece ends."""
    run = tmp_path_factory.getbasetemp() / "bulk"
    if not run.exists():
        make_run(run, losses=[6.0, math.nan, *LOSSES, -0.0, 0.0], grad_norms=[0.0, -0.0] * 6)
        rows = [json.loads(line) for line in (run / "steps.jsonl").read_text().splitlines()]
        rows[3]["losses"], rows[7]["losses"] = {"kl": 1}, {"kl": "inf", "x": 2.5}
        (run / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = (run / "steps.jsonl").read_bytes()
    change = data.draw(st.sampled_from([byte_changes, json_changes, st.just]))
    try:
        (run / "steps.jsonl").write_bytes(data.draw(change(whole)))
        seen = []
        for size in (1, data.draw(st.integers(100, 1000)), 2**18):  # a piece of 1 byte is read line by line
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(reading, "CHUNK_BYTES", size)
                seen.append(outcome(run))
        assert len(set(seen)) == 1, seen
    finally:
        (run / "steps.jsonl").write_bytes(whole)


def test_files_changed_at_random_are_compared_or_refused(tmp_path: Path) -> None:
    other, run = read_run(make_run(tmp_path / "other", "amp-fp32")), make_run(tmp_path / "run")
    whole = {name: (run / name).read_bytes() for name in FILES}
    outcomes = []

    @fuzz(400)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(FILES))
        change = data.draw(st.sampled_from([byte_changes, json_changes]))
        (run / name).write_bytes(data.draw(change(whole[name])))
        said = ""
        try:
            read = read_run(run)
            assert len({len(column) for column in read.steps.values()}) == 1
            floats = [v for column in ("loss", "grad_norm", "loss_scale", "lr") for v in read.steps[column]]
            assert {type(v) for v in floats} == {float}
            assert len(table(compare_runs([other, read], anyway=True))) < 20_000
        except UsageError as error:
            said = str(error)
        finally:
            (run / name).write_bytes(whole[name])
        outcomes.append("refused" if said else "compared")
        assert said.isprintable()
        assert len(said) < 700

    check()
    assert min(map(outcomes.count, ("compared", "refused"))) > len(outcomes) / 13


@fuzz(300)
@given(st.binary(max_size=60) | st.text('{}[]",:\\u0019eE.-"nulltrfas', max_size=30).map(str.encode))
def test_any_bytes_are_an_object_or_refused(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(data)
    said = ""
    try:
        assert isinstance(read_object(path), dict)
    except UsageError as error:
        said = str(error)
    assert said.isprintable()


BOUNDED = """
import resource, sys
from roundoff import read_run
from roundoff.errors import UsageError
taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (taken + 100 * 2**20,) * 2)
for path in sys.argv[1:]:
    try: print("read", len(read_run(path).steps["step"]))
    except UsageError: print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can bound a process's memory")
def test_a_run_directory_takes_little_memory(tmp_path: Path) -> None:
    """100 MiB for files of a terabyte, and for 20 MB of rows that would take half a gigabyte if they were kept."""
    runs = [make_run(tmp_path / name) for name in FILES]
    for run in runs:
        os.truncate(run / run.name, 2**40)
    nested = make_run(tmp_path / "nested")
    row = json.loads((nested / "steps.jsonl").read_text().splitlines()[0])
    with (nested / "steps.jsonl").open("w") as file:
        file.writelines(json.dumps(row | {"step": i, "x": [[]] * 16_000}) + "\n" for i in range(1, 320))
    command = [sys.executable, "-W", "error::SyntaxWarning", "-c", BOUNDED, *map(str, [*runs, nested])]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert (done.stdout.splitlines(), done.stderr) == (["refused"] * 4 + ["read 319"], "")


@given(st.text(st.characters(exclude_categories=[])), st.integers(2, 30))
def test_printable_is_one_bounded_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text
