"""probe.json is written whole, read strictly, and refused in one line where it is something else."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from programs import strict_json
from roundoff.errors import UsageError
from roundoff.gradients.result import read_probe, write_probe
from samples import sample


def test_what_was_written_is_read(tmp_path: Path) -> None:
    write_probe(tmp_path / "probe.json", sample())
    assert read_probe(tmp_path / "probe.json") == sample()
    assert strict_json((tmp_path / "probe.json").read_text()) == sample()


def refusal(path: Path, text: str | None = None) -> str:
    if text is not None:
        path.write_text(text)
    with pytest.raises(UsageError) as error:
        read_probe(path)
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "no probe.json of this project"),
        ('{"format": "lm-precision probe 2"}', "no probe.json of this project"),
        ('{"format": "lm-precision probe 1"}', "probe.json: an older version wrote this probe; probe again"),
        *((text, "") for text in ("", "[1]", '{"a":', "NaN")),
    ],
)
def test_something_else_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path / "probe.json", text)


def test_no_file_is_refused(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "probe.json")
    assert refusal(tmp_path).endswith("give a probe.json that probe.py wrote")


@pytest.mark.parametrize("name", [name for name in sample() if name != "format"])
def test_every_field_is_checked(tmp_path: Path, name: str) -> None:
    allowed = {"environment": dict, "job": dict, "about": str, "scale": int}
    for value in (float("nan"), -1, "<b>", [[]], {"a": {}}, True):
        if type(value) is not allowed.get(name):
            text = json.dumps(sample() | {name: value})
            assert f"field {name} is not" in refusal(tmp_path / "probe.json", text)
    left_out = {field: content for field, content in sample().items() if field != name}
    assert f"field {name} is missing" in refusal(tmp_path / "probe.json", json.dumps(left_out))


@pytest.mark.parametrize("value", [1.5, -0.1, "0.5", float("inf"), True])
def test_a_share_is_from_0_to_1(tmp_path: Path, value: Any) -> None:
    result = copy.deepcopy(sample())
    result["modes"]["manual"]["total"]["flushed"] = value
    assert "field modes is not" in refusal(tmp_path / "probe.json", json.dumps(result))


SPOILT: dict[str, Callable[[dict[str, Any]], object]] = {
    "one tensor less": lambda result: result["tensors"].pop(),
    "one share less": lambda result: result["scales"]["predicted"]["logits"]["flushed"].pop(),
    "a scale twice": lambda result: result["scales"]["k"].__setitem__(1, -8),
    "no values of a tensor": lambda result: result["modes"]["fp32"]["tensors"].pop("logits"),
    "a window upside down": lambda result: result.update(window={"low": 3, "high": 2}),
    "no scale at all": lambda result: result["scales"].update(k=[]),
}


@pytest.mark.parametrize("spoilt", SPOILT)
def test_fields_must_be_of_one_probe(tmp_path: Path, spoilt: str) -> None:
    result = copy.deepcopy(sample())
    SPOILT[spoilt](result)
    assert "not of one probe" in refusal(tmp_path / "probe.json", json.dumps(result))
