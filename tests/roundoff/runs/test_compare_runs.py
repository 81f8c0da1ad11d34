"""Reading a run directory: what is there is what was written, and what is wrong gets one clear line."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import jobs
from lm.options.modes import MODES
from roundoff.errors import UsageError, printable
from roundoff.runs.reading import read_run
from synthetic import LOSSES, change_json, make_config, make_run, write_json


def refusal(path: Path) -> str:
    with pytest.raises(UsageError) as error:
        read_run(path)
    text = str(error.value)
    assert text.isprintable()
    assert len(text) < 600
    return text


def change_row(path: Path, number: int, **fields: Any) -> None:
    lines = path.read_text().splitlines()
    lines[number - 1] = json.dumps(json.loads(lines[number - 1]) | fields)
    path.write_text("\n".join(lines) + "\n")


@pytest.mark.parametrize("label", MODES)
def test_reads_what_was_written(tmp_path: Path, label: str) -> None:
    path = make_run(tmp_path / "run", label, 7, applied=[True] * 7 + [False], test_loss=4.5)
    run = read_run(path)
    assert (run.path, run.label, run.seed, run.status, run.problems) == (path, label, 7, "finished", [])
    assert run.config == make_config(label, 7)
    scale = {"fp16-optimizer-dynamic": 65536.0, "amp-fp16": 65536.0, "manual": 128.0, "fp16-optimizer": 128.0}
    assert run.steps == {
        "step": [1, 2, 3, 4, 5, 6, 7, 8],
        "epoch": [1, 1, 1, 1, 2, 2, 2, 2],
        "loss": LOSSES,
        "grad_norm": [0.25] * 7 + [math.inf],
        "loss_scale": [scale.get(label, 1.0)] * 8,
        "applied": [True] * 7 + [False],
        "lr": [20.0] * 8,
    }
    assert [row["valid_loss"] for row in run.epochs] == [6.125, 5.125]
    assert run.result is not None
    assert (run.result["test_loss"], run.result["steps"], run.result["skipped"]) == (4.5, 8, 1)


def test_reads_a_trainer_run(tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs.run(monkeypatch, corpus, tmp_path / "run", "main_amp", "--max-steps", "6", "--clip", "inf") == 0
    run = read_run(tmp_path / "run")
    assert (run.label, run.status, run.problems) == ("amp-fp16", "finished", [])
    assert run.job["clip"] == "inf"
    rows = jobs.rows(tmp_path / "run")
    assert run.steps["loss"] == [float(row["loss"]) for row in rows]
    assert run.steps["applied"] == [row["applied"] for row in rows]
    assert len(rows) == 6


def test_no_result_is_unfinished(tmp_path: Path) -> None:
    assert read_run(make_run(tmp_path / "run", status=None)).status == "unfinished"


@pytest.mark.parametrize("status", ["interrupted", "diverged"])
def test_status_and_no_test_loss(tmp_path: Path, status: str) -> None:
    run = read_run(make_run(tmp_path / "run", status=status, test_loss=None))
    assert run.result is not None
    assert (run.status, run.result["test_loss"]) == (status, None)


def test_inf_and_nan(tmp_path: Path) -> None:
    losses = [6.0, math.nan, math.inf, -math.inf]
    run = read_run(make_run(tmp_path / "run", losses=losses, test_loss=math.nan))
    assert [str(loss) for loss in run.steps["loss"]] == ["6.0", "nan", "inf", "-inf"]
    assert run.result is not None
    assert math.isnan(run.result["test_loss"])


@pytest.mark.parametrize("kept", [1, 30, -2])
def test_cut_last_line_is_passed_over(tmp_path: Path, kept: int) -> None:
    path = make_run(tmp_path / "run", status=None)
    lines = (path / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (path / "steps.jsonl").write_bytes(b"".join(lines[:-1]) + lines[-1][:kept])
    run = read_run(path)
    assert run.steps["loss"] == LOSSES[:-1]
    assert run.problems == ["the last line of steps.jsonl is cut off, and is passed over"]


def test_last_line_without_newline_counts(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "steps.jsonl").write_bytes((path / "steps.jsonl").read_bytes()[:-1])
    run = read_run(path)
    assert (run.steps["loss"], run.problems) == (LOSSES, [])


@pytest.mark.parametrize("line", [b"", b"{", b"\xff\xfe", b"[" * 60_000, b"1" * 5000, b"{}{}"])
def test_broken_line_in_the_middle_is_refused(tmp_path: Path, line: bytes) -> None:
    path = make_run(tmp_path / "run")
    lines = (path / "steps.jsonl").read_bytes().splitlines()
    (path / "steps.jsonl").write_bytes(b"\n".join([*lines[:3], line, *lines[3:]]))
    assert "steps.jsonl: line 4 cannot be read as JSON" in refusal(path)


def test_unknown_fields_are_ignored(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    change_row(path / "steps.jsonl", 2, future=[1, {"a": None}])
    change_json(path / "result.json", future="<b>")
    change_json(path / "config.json", future={"a": [1, 2]})
    run = read_run(path)
    assert (run.steps["loss"], run.problems) == (LOSSES, [])
    assert run.config["future"] == {"a": [1, 2]}
    assert run.result is not None
    assert "future" not in run.result


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("loss", True, 'field loss is True, where a number, "inf", "-inf" or "nan" belongs'),
        ("loss", "6.5", "field loss is '6.5', where a number"),
        ("loss", None, "field loss is None, where a number"),
        ("loss", 10**400, "field loss is 1000"),
        ("loss", [[[[[[[[1]]]]]]]], "field loss is [["),
        ("step", 1.5, "field step is 1.5, where a whole number belongs"),
        ("step", -1, "field step is -1, where a whole number belongs"),
        ("epoch", False, "field epoch is False, where a whole number belongs"),
        ("applied", 1, "field applied is 1, where true or false belongs"),
        ("grad_norm", "\x1b[2J", "field grad_norm is '\\x1b[2J', where a number"),
    ],
)
def test_wrong_type_in_a_row(tmp_path: Path, field: str, value: Any, said: str) -> None:
    path = make_run(tmp_path / "run")
    change_row(path / "steps.jsonl", 3, **{field: value})
    assert f"steps.jsonl, line 3: {said}" in refusal(path)


@pytest.mark.parametrize("row", ["[]", "3", '"x"', "null"])
def test_row_that_is_no_object(tmp_path: Path, row: str) -> None:
    path = make_run(tmp_path / "run")
    lines = (path / "steps.jsonl").read_text().splitlines()
    (path / "steps.jsonl").write_text("\n".join([lines[0], row, *lines[1:]]))
    assert "steps.jsonl: line 2 is " in refusal(path)


@pytest.mark.parametrize(
    ("name", "field", "value", "said"),
    [
        ("config.json", "seed", True, "field seed is True, where a whole number"),
        ("config.json", "seed", 2**63, "field seed is 9223372036854775808, where a whole number"),
        ("config.json", "seed", "1111", "field seed is '1111', where a whole number"),
        ("config.json", "job", [], "field job is [], where an object"),
        ("config.json", "environment", None, "field environment is None, where an object"),
        ("result.json", "status", "done", '"finished" or "interrupted" or "diverged" belongs'),
        ("result.json", "status", [], "field status is [], where"),
        (
            "result.json",
            "test_loss",
            False,
            'field test_loss is False, where a number, "inf", "-inf" or "nan", or null',
        ),
        ("result.json", "steps", None, "field steps is None, where a whole number"),
    ],
)
def test_wrong_type_in_a_file(tmp_path: Path, name: str, field: str, value: Any, said: str) -> None:
    path = make_run(tmp_path / "run")
    change_json(path / name, **{field: value})
    text = refusal(path)
    assert text.startswith(f"{path / name}: ")
    assert said in text


def test_missing_field(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    config = make_config()
    del config["precision"]
    write_json(path / "config.json", config)
    assert "config.json: field precision is missing, where an object" in refusal(path)


def test_missing_directory_or_file(tmp_path: Path) -> None:
    assert f"{tmp_path / 'none'}: there is no such directory" in refusal(tmp_path / "none")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: this is no directory" in refusal(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    assert f"{tmp_path / 'empty' / 'config.json'}: there is no such file" in refusal(tmp_path / "empty")
    assert "File name too long" in refusal(tmp_path / ("x" * 300))
    path = make_run(tmp_path / "run")
    (path / "steps.jsonl").unlink()
    assert f"{path / 'steps.jsonl'}: there is no such file" in refusal(path)
    assert refusal(tmp_path / "a\nb\x1b").startswith(f"{tmp_path}/a\\nb\\x1b: there is no such directory")


def test_epochs_may_be_missing(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    (path / "epochs.jsonl").unlink()
    run = read_run(path)
    assert (run.epochs, run.problems) == ([], ["epochs.jsonl is missing"])


@pytest.mark.parametrize("rows", [b"", b'{"step": 1, "ep'])
def test_run_of_no_steps(tmp_path: Path, rows: bytes) -> None:
    path = make_run(tmp_path / "run", status=None)
    (path / "steps.jsonl").write_bytes(rows)
    assert refusal(path) == f"{path} is a run of no steps: there is nothing to compare; let it train longer"


@pytest.mark.parametrize("name", ["config.json", "result.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000, b'{"a":' * 30 + b"1" + b"}" * 30, b"1" * 5000],
)
def test_broken_file(tmp_path: Path, name: str, content: bytes) -> None:
    path = make_run(tmp_path / "run")
    (path / name).write_bytes(content)
    assert refusal(path).startswith(f"{path / name} ")


def test_file_that_is_far_too_large(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    with (path / "config.json").open("r+b") as file:
        file.truncate(2**40)
    assert "has more than 1048576 bytes" in refusal(path)


def test_lone_surrogates_do_not_survive(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    config = json.dumps(make_config() | {"data": "\ud800", "precision": {"mode": "\udfff"}})
    (path / "config.json").write_text(config)
    run = read_run(path)
    assert (run.config["data"], run.label) == ("?", "?")


@pytest.mark.parametrize(
    ("order", "losses", "problems"),
    [
        ([1, 2, 2, 3], [0, 2, 3], ["steps.jsonl repeats step 2: of 4 rows, the last of each step counts"]),
        ([2, 1, 3], [1, 0, 2], ["steps.jsonl is not in the order of its steps, and was sorted"]),
        ([1, 2, 4], [0, 1, 2], ["steps.jsonl has no step 3, though it goes to 4"]),
        ([3], [0], ["steps.jsonl has no step 1, though it goes to 3"]),
        ([1, 2**62], [0, 1], [f"steps.jsonl has no step 2, though it goes to {2**62}"]),
        (
            [1, 2, 1],
            [2, 1],
            [
                "steps.jsonl repeats step 1: of 3 rows, the last of each step counts",
                "steps.jsonl is not in the order of its steps, and was sorted",
            ],
        ),
    ],
)
def test_steps_repeated_or_out_of_order(
    tmp_path: Path, order: list[int], losses: list[int], problems: list[str]
) -> None:
    path = make_run(tmp_path / "run", status=None, losses=[float(i) for i in range(len(order))])
    for number, step in enumerate(order, 1):
        change_row(path / "steps.jsonl", number, step=step)
    run = read_run(path)
    assert run.steps["step"] == sorted(set(order))
    assert run.steps["loss"] == losses
    assert run.problems == problems


def test_result_that_counts_other_steps(tmp_path: Path) -> None:
    path = make_run(tmp_path / "run")
    change_json(path / "result.json", steps=9)
    assert read_run(path).problems == ["result.json counts 9 steps, steps.jsonl has 8"]


@given(st.text(st.characters(exclude_categories=[])), st.integers(2, 30))
def test_printable_is_one_bounded_line(text: str, limit: int) -> None:
    shown = printable(text, limit)
    assert shown.isprintable()
    assert len(shown) <= limit
    if text.isprintable() and len(text) <= limit:
        assert shown == text
