"""probe.json is written whole, read strictly, and refused in one line where it is something else."""

import copy
import json

import pytest

from programs import strict_json
from roundoff.errors import UsageError
from roundoff.gradients.result import read_probe, write_probe
from samples import sample


def test_what_was_written_is_read(tmp_path):
    write_probe(tmp_path / "probe.json", sample())
    assert read_probe(tmp_path / "probe.json") == sample()
    assert strict_json((tmp_path / "probe.json").read_text()) == sample()


def refusal(path) -> str:
    with pytest.raises(UsageError) as error:
        read_probe(path)
    message = str(error.value)
    assert "\n" not in message
    assert message.endswith("give a probe.json that probe.py wrote")
    return message


@pytest.mark.parametrize("content", ["{}", '{"format": "lm-precision probe 2"}'])
def test_something_else_is_refused(tmp_path, content):
    (tmp_path / "probe.json").write_text(content)
    assert "no probe.json of this project" in refusal(tmp_path / "probe.json")


def test_no_file_is_refused(tmp_path):
    assert "no such file" in refusal(tmp_path / "probe.json")
    assert "no file" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["", "[1]", '{"a":', "NaN"])
def test_no_json_is_refused(tmp_path, text):
    (tmp_path / "probe.json").write_text(text)
    with pytest.raises(UsageError, match=r"^[^\n]*$"):
        read_probe(tmp_path / "probe.json")


@pytest.mark.parametrize("name", [name for name in sample() if name != "format"])
@pytest.mark.parametrize("value", [float("nan"), -1, "<b>", [[]], {"a": {}}, True])
def test_every_field_is_checked(tmp_path, name, value):
    allowed = {"environment": dict, "corpus": dict, "model": dict, "data": str, "scale": int}
    if type(value) is allowed.get(name):
        return
    (tmp_path / "probe.json").write_text(json.dumps(sample() | {name: value}))
    assert f"field {name} is not" in refusal(tmp_path / "probe.json")
    left_out = {field: content for field, content in sample().items() if field != name}
    (tmp_path / "probe.json").write_text(json.dumps(left_out))
    assert f"field {name} is missing" in refusal(tmp_path / "probe.json")


def _one_tensor_less(result):
    del result["tensors"][0]


def _one_share_less(result):
    result["scales"]["predicted"]["logits"]["flushed"].pop()


def _a_scale_twice(result):
    result["scales"]["k"][1] = result["scales"]["k"][0]


def _no_values_of_a_tensor(result):
    del result["modes"]["fp32"]["tensors"]["logits"]


def _a_window_upside_down(result):
    result["window"] = {"low": 3, "high": 2}


def _no_scale_at_all(result):
    result["scales"]["k"] = []


@pytest.mark.parametrize(
    "spoil",
    [
        _one_tensor_less,
        _one_share_less,
        _a_scale_twice,
        _no_values_of_a_tensor,
        _a_window_upside_down,
        _no_scale_at_all,
    ],
)
def test_fields_must_be_of_one_probe(tmp_path, spoil):
    result = copy.deepcopy(sample())
    spoil(result)
    write_probe(tmp_path / "probe.json", result)
    assert "not of one probe" in refusal(tmp_path / "probe.json")


@pytest.mark.parametrize("value", [1.5, -0.1, "0.5", float("inf"), True])
def test_a_share_is_from_0_to_1(tmp_path, value):
    result = copy.deepcopy(sample())
    result["modes"]["manual"]["total"]["flushed"] = value
    (tmp_path / "probe.json").write_text(json.dumps(result))
    assert "field modes is not" in refusal(tmp_path / "probe.json")
