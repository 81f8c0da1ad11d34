"""Run directories changed at random are read or refused, in bounded memory; nothing else happens."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bounded import FORMAT, needs_bounds, read_bounded
from fuzzing import changed, fuzz
from lm.launch.jobs import comparison_folder
from roundoff.errors import UsageError
from roundoff.runs.reading import read_object, read_run
from roundoff.runs.tensor_file import save_tensors
from synthetic import make_run

FILES = ("config.json", "result.json", "steps.jsonl", "epochs.jsonl")


def refusal(read: Callable[[], object]) -> str:
    """What the UsageError says; "" where all was read."""
    try:
        read()
    except UsageError as error:
        return str(error)
    return ""


def test_files_changed_at_random(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    whole = {name: (run / name).read_bytes() for name in FILES}
    refusals = []

    @fuzz(400)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        name = data.draw(st.sampled_from(FILES))
        (run / name).write_bytes(data.draw(st.composite(changed)(whole[name])))
        refusals.append(refusal(lambda: read_run(run)))
        (run / name).write_bytes(whole[name])
        assert refusals[-1].isprintable()
        assert len(refusals[-1]) < 700

    check()
    assert min(refusals.count(""), len(refusals) - refusals.count("")) > 50


@fuzz(300)
@given(st.binary(max_size=60) | st.text('{}[]",:\\u0019eE.-"nulltrfas', max_size=30).map(str.encode))
def test_any_bytes_are_an_object_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_bytes(content)
    assert refusal(lambda: read_object(path)).isprintable()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@fuzz(60)
@given(data=st.data(), value=json_values)
def test_any_value_in_any_field_is_read_or_refused(tmp_path: Path, data: st.DataObject, value: Any) -> None:
    path = tmp_path / "run"
    if not path.exists():
        make_run(path)
    name = data.draw(st.sampled_from(FILES))
    kept = (path / name).read_bytes()
    rows = [json.loads(line) for line in kept.splitlines()] if name.endswith("l") else [json.loads(kept)]
    row = data.draw(st.sampled_from(rows))
    row[data.draw(st.sampled_from(sorted(row)))] = value
    (path / name).write_text("\n".join(map(json.dumps, rows)))
    text = "read"
    try:
        run = read_run(path)
        lengths = {len(column) for column in run.steps.values()}
        assert len(lengths) == 1
        assert all(type(v) is float for name in ("loss", "grad_norm", "loss_scale", "lr") for v in run.steps[name])
    except UsageError as error:
        text = str(error)
    (path / name).write_bytes(kept)
    assert text.isprintable()


@pytest.mark.slow
@needs_bounds
def test_a_run_directory_takes_little_memory(tmp_path: Path) -> None:
    """100 MiB for files of a terabyte, and for 20 MB of rows that would take half a gigabyte if they were kept."""
    save_tensors(tmp_path / "good", [], FORMAT)
    runs = [make_run(tmp_path / name) for name in FILES]
    for run in runs:
        os.truncate(run / run.name, 2**40)
    nested = make_run(tmp_path / "nested")
    rows = [json.loads(line) for line in (nested / "steps.jsonl").read_text().splitlines()]
    with (nested / "steps.jsonl").open("w") as file:
        file.writelines(json.dumps(rows[i % 8] | {"step": i, "x": [[]] * 16_000}) + "\n" for i in range(1, 320))
    assert read_bounded(100, tmp_path / "good", *runs, nested) == ["read", *["refused"] * 4, "read"]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "holds something else"),
        (b'{"modes": 1}', "holds something else"),
        (b"\xff", "holds something else"),
        (b'{"modes": "\\u001b[2J\\n", "seeds": null}', r"was made with modes \\x1b\[2J\\n, now \['fp32'\]; seeds None"),
    ],
)
def test_a_plan_made_to_do_harm(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "compare.json").write_bytes(content)
    plan = {"modes": ["fp32"], "seeds": [1]}
    with pytest.raises(UsageError, match=said) as error, comparison_folder(tmp_path, plan):
        pass
    assert str(error.value).isprintable()
