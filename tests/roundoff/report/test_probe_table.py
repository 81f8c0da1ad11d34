"""The terminal's table of a probe: the figures of the result, and nothing that a terminal would obey."""

import pytest

from odd_probes import empty, extreme, nothing_known, renamed
from roundoff.gradients.advice import said
from roundoff.report.probe_table import COLUMNS, percent, side_by_side, table
from roundoff.report.probe_view import short
from samples import KS, MODES, TENSORS, sample

EVIL = "evil\x1b[2J\r\n\u202e<script>" + "x" * 300


def cells(text: str, start: str) -> list[list[str]]:
    return [line.split() for line in text.split("\n\n")[1].splitlines() if line.startswith(start + " ")]


def test_a_row_a_mode_and_one_for_its_worst_tensor() -> None:
    result = sample()
    result["modes"]["manual"]["tensors"]["rnn.bias_hh_l1"] |= {"error_to_noise": 0.25, "error_to_noise_error": 0.0025}
    result["modes"]["manual"]["tensors"]["logits"]["error_to_noise"] = 7.0  # a boundary, which is no parameter
    text = table(result)
    assert cells(text, "fp32") == [
        ["fp32", "2.0e-07", "+-5%", "5.0e-08", "+-13%", "0", "0%", "0%", "0%", "<.001%"],
    ]
    (manual,) = cells(text, "manual")
    assert manual == ["manual", "1.2e-03", "+-5%", "3.0e-04", "+-13%", "0", "0%", "0.13%", "0%", "31%"]
    worst = cells(text, "worst")
    assert len(worst) == len(MODES)
    assert worst[1][:4] == ["worst", "rnn.bias_hh_l1", "2.5e-01", "+-1%"]
    assert len(COLUMNS) == 8
    assert max(map(len, text.split("\n\n")[1].splitlines())) <= 100


def test_sentences_around_the_table() -> None:
    result = sample()
    text = table(result)
    lines = [line.strip() for line in text.splitlines()]
    for sentence in (*result["advice"], *result["covers"]):
        assert sentence in lines
    assert lines[0] == said(result)
    assert lines[1] == (
        "LSTM of 2 layers with 64 units and 200 words, fresh weights of seed 1111; "
        "32 batches of 7 x 10 words of corpus."
    )
    assert lines[2].endswith("length 1.1e-01; standard deviation from batch to batch (noise): 3.1e-01 +-4%.")


def test_without_explanations_the_figures_and_the_advice_are_left() -> None:
    result = sample()
    whole, brief = table(result).split("\n\n"), table(result, explained=False).split("\n\n")
    assert brief == [*whole[:3], whole[6]]
    assert brief[3].splitlines() == ["Advice:", *(f"  {sentence}" for sentence in result["advice"])]


def test_the_forward_pass_and_the_critical_batch() -> None:
    """The mode and its critical batch stand in the first of its rows alone."""
    result = sample()
    result["modes"]["manual"]["forward"]["logits"] = {"mean": None, "largest": None}
    rows = [line.split() for line in table(result).split("\n\n")[2].splitlines()]
    assert rows[3] == ["fp32", "-", "loss", "-1.0e-04", "2.0e-04"]
    assert rows[4][:3] == ["manual", f"{result['modes']['manual']['total']['critical_batch']:.2g}", "loss"]
    assert rows[5] == ["logits", "not", "finite", "not", "finite"]


def test_prediction_stands_beside_measurement_and_the_largest_share_first() -> None:
    result = sample()
    result["scales"]["measured"][1]["tensors"]["decoder.bias"]["flushed"] = 0.5
    result["scales"]["predicted"]["decoder.bias"]["flushed"][KS.index(7)] = 0.25
    heads, rows = side_by_side(result, "flushed")
    assert list(heads) == ["tensor", "manual\nat 2**0", "manual\nat 2**7", "fp16-opt…r-dynamic\nat 2**16"]
    assert rows[0] == ["decoder.bias", "<.001% / <.001%", "25% / 50%", "0% / 0%"]
    assert rows[1][:2] == ["logits", "9.1% / 9.1%"]
    assert len(rows) == len(TENSORS)
    text = table(result)
    assert "25% / 50%" in text
    assert "rnn.bias_hh_l1 " not in text.split("predicted / measured")[1].split("Overflowed")[0]  # the 13th


def test_of_overflow_only_the_tensors_that_have_some_are_told() -> None:
    result = sample()
    for name in TENSORS:
        shares = result["scales"]["predicted"][name]["overflowed"]
        shares[:] = [0.0] * len(shares)
        for measured in result["scales"]["measured"]:
            measured["tensors"][name]["overflowed"] = 0.0
    assert side_by_side(result, "overflowed")[1] == []
    assert "Overflowed at" not in table(result)
    result["scales"]["measured"][2]["tensors"]["decoder.bias"]["overflowed"] = 0.25
    assert side_by_side(result, "overflowed")[1] == [["decoder.bias", "0% / 0%", "0% / 0%", "0% / 25%"]]
    assert "Overflowed at" in table(result)


def test_what_is_not_known_is_a_dash() -> None:
    text = table(nothing_known())
    assert cells(text, "manual") == [["manual", *"-------"]]
    assert cells(text, "worst") == []
    assert "length -; standard deviation from batch to batch (noise): -." in text
    assert "None" not in text


def test_a_probe_of_no_mode_and_nothing_to_say() -> None:
    text = table(empty())
    for title in ("Advice", "cover", "predicted"):
        assert title not in text


@pytest.mark.parametrize(
    ("share", "shown"),
    [
        (None, "-"), (0, "0%"), (1e-300, "<.001%"), (9.9e-6, "<.001%"), (1e-5, "0.001%"), (0.00123, "0.12%"),
        (0.5, "50%"), (0.99949, "99.9%"), (0.9999999, ">99.9%"), (1, "100%"),
    ],
)  # fmt: skip
def test_a_share_is_a_few_characters(share: float | None, shown: str) -> None:
    assert percent(share) == shown


def test_names_are_data() -> None:
    shown = table(renamed(lambda name: name + EVIL))
    assert all(line.isprintable() for line in shown.splitlines())
    assert "manual" in shown
    assert "evil\\x1b[2J\\r\\n\\u202e<script>" in shown
    assert max(map(len, shown.split("\n\n")[1].splitlines())) <= 100
    assert max(map(len, shown.splitlines())) <= 1100


def test_long_names_keep_both_ends() -> None:
    assert short("rnn.weight_hh_l0") == "rnn.weight_hh_l0"
    long = "rnn.layers.11.self_attn.in_proj_weight"
    assert short(long) == "rnn.layers.11…in_proj_weight"
    assert len(short(long, 12)) == 12


def test_extreme_figures_fit() -> None:
    text = table(extreme())
    assert cells(text, "fp32")[0][:3] == ["fp32", "1.7e+308", "+-100%"]
    assert cells(text, "manual")[0][:3] == ["manual", "4.9e-324", "+-100%"]
