"""probe.html: the figures are those of the result, names are text, and nothing is fetched."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from odd_probes import empty, extreme, nothing_known, of_tensors, renamed
from pages import Page, numbers
from roundoff.report import curves
from roundoff.report.probe_figures import charts
from roundoff.report.probe_html import section, write_html
from samples import KS, MODES, TENSORS, sample

PARAMETERS = [name for name, (kind, _, _) in TENSORS.items() if kind == "parameter"]
EVIL = "</script><script>document.hacked=1</script><img src=x onerror=alert(1)>$x$"


def page_of(tmp_path: Path, result: dict[str, Any]) -> Page:
    write_html(tmp_path / "probe.html", result)
    assert [path.name for path in tmp_path.iterdir()] == ["probe.html"]  # nothing left beside it
    return Page((tmp_path / "probe.html").read_text(encoding="utf-8"))


@pytest.mark.parametrize(("chart", "figure"), [("error", "error_to_noise"), ("bias", "bias")])
def test_errors_of_the_result_stand_in_their_rows(tmp_path: Path, chart: str, figure: str) -> None:
    result = sample()
    drawn = page_of(tmp_path, result).charts[chart]
    assert drawn["layout"]["yaxis"]["ticktext"] == ["<b>all parameters</b>", *PARAMETERS]
    assert drawn["layout"]["xaxis"]["type"] == "log"
    assert [trace["name"] for trace in drawn["data"]] == list(MODES)
    for i, (mode, trace) in enumerate(zip(MODES, drawn["data"], strict=True)):
        of_mode = result["modes"][mode]
        wanted = [of_mode["total"], *(of_mode["tensors"][name] for name in PARAMETERS)]
        assert numbers(trace["x"]) == [values[figure] for values in wanted]
        assert numbers(trace["customdata"]) == [values[f"{figure}_error"] for values in wanted]
        found = numbers(trace["error_x"]["arrayminus"]), numbers(trace["error_x"]["array"])
        for row, values in enumerate(wanted):
            x, error = values[figure], values[f"{figure}_error"]
            s = (x + error) ** 2 - x**2
            down, up = (2 * error, 2 * error) if figure != "bias" else (
                x - math.sqrt(max(0, x**2 - 2 * s)), math.sqrt(x**2 + 2 * s) - x,
            )  # fmt: skip
            assert (found[0][row], found[1][row]) == pytest.approx((min(down, x), up), rel=1e-5)
        assert [round(row) for row in numbers(trace["y"])] == list(range(len(wanted)))
        assert trace["text"] == ["all parameters", *PARAMETERS]
        assert (trace["meta"], trace["marker"]["color"]) == (i, curves.style(i).colour)
        low, high = drawn["layout"]["xaxis"]["range"]
        assert all(low < math.log10(x) < high for x in numbers(trace["x"]))


def test_no_bar_reaches_0_where_there_is_no_place_for_it(tmp_path: Path) -> None:
    result = sample()
    result["modes"]["manual"]["total"] |= {"bias": 1e-4, "bias_error": 3e-4}
    result["modes"]["manual"]["tensors"][PARAMETERS[0]] |= {"bias": 0.0, "bias_error": 1e-4}
    result["modes"]["manual"]["tensors"][PARAMETERS[1]] |= {"bias": 1e-4, "bias_error": None}
    trace = page_of(tmp_path, result).charts["bias"]["data"][1]
    assert trace["text"] == ["all parameters", *PARAMETERS[1:]]  # 0 has no mark
    low, high = numbers(trace["error_x"]["arrayminus"]), numbers(trace["error_x"]["array"])
    assert (low[0], high[0]) == pytest.approx((1e-4, math.sqrt(31e-8) - 1e-4), rel=1e-5)
    assert low[0] < 1e-4
    assert (low[1], high[1]) == (0, 0)


def test_shares_at_every_scale_and_the_window(tmp_path: Path) -> None:
    result = sample()
    drawn = page_of(tmp_path, result).charts["heat"]
    heat, triangles = drawn["data"]
    assert drawn["layout"]["yaxis"]["ticktext"] == list(TENSORS)
    assert numbers(heat["x"]) == KS
    shares = numbers(heat["customdata"])
    place = 0
    for name in TENSORS:
        for k in range(len(KS)):
            for what in ("flushed", "subnormal", "overflowed"):
                assert shares[place] == result["scales"]["predicted"][name][what][k]
                place += 1
    assert place == len(shares)
    frame, take = drawn["layout"]["shapes"]
    assert (frame["type"], frame["x0"], frame["x1"]) == ("rect", 5.5, 15.5)  # whole cells of 2^6 to 2^15
    assert (take["type"], take["x0"], take["x1"]) == ("line", 11, 11)
    assert numbers(triangles["x"]) == [7, 16]
    assert triangles["text"] == ["manual", "fp16-optimizer-dynamic, amp-fp16"]


def test_no_window_is_said(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample() | {"window": None, "scale": None})
    assert page.charts["heat"]["layout"].get("shapes", []) == []
    assert "No scale that was looked at serves every tensor." in page.text
    assert "Frame:" not in page.text


def test_the_page_says_all_that_was_found(tmp_path: Path) -> None:
    result = sample()
    text = page_of(tmp_path, result).text
    for sentence in (*result["advice"], *result["covers"]):
        assert sentence in text
    for shown in ("1.2e-03 +-5%", "loss scale 65536, float16 weights, float16 gradients", "worst: encoder.weight"):
        assert shown in text
    assert "logits9.1% / 9.1%0.012% / 0.012%0% / 0%" in text
    assert "corpus sha256 train" + "0" * 64 in text
    assert "peak_memory_bytes381 MiB" in text
    for name in TENSORS:
        assert text.count(name) >= len(MODES)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    page = page_of(tmp_path, renamed(lambda name: name + EVIL))
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "object")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert len(page.scripts) == 3
    assert page.text.count(EVIL) > 10
    for figure in page.charts.values():
        for trace in figure["data"]:
            assert "script" not in trace["hovertemplate"]
            assert "<" not in str(trace.get("text", "")) + trace.get("name", "")
        assert not [text for text in figure["layout"]["yaxis"]["ticktext"] if "<" in text.replace("<b>all", "all")[:-4]]


def test_the_page_runs_its_two_scripts_only_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, sample())
    page.runs_only_its_scripts()


@pytest.mark.parametrize("make", [nothing_known, empty, extreme, lambda: of_tensors(1), lambda: of_tensors(40)])
def test_odd_results_make_a_page(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    page = page_of(tmp_path, make())
    places = [attrs["id"] for tag, attrs in page.tags if tag == "div" and "id" in attrs]
    assert places == list(page.charts)
    assert "heat" in places
    assert "None" not in page.text
    assert "nan" not in page.text
    if make in (nothing_known, empty):
        assert places == ["heat"]
        assert "No mode has a known error to noise above 0." in page.text


def test_forty_long_names_are_told_apart() -> None:
    error, _, heat = charts(of_tensors(40))
    for chart, count in ((error, 41), (heat, 40)):
        names = chart.figure.layout.yaxis.ticktext
        assert len(set(names)) == len(names) == count
        assert max(len(name) for name in names) <= len("<b>all parameters</b>") + 10
        assert chart.figure.layout.height > 20 * count


def test_equal_results_make_equal_pages(tmp_path: Path) -> None:
    write_html(tmp_path / "a", sample())
    write_html(tmp_path / "b", sample())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_modes_keep_the_colours_that_they_have_elsewhere_in_the_page() -> None:
    places = {mode: 7 - i for i, mode in enumerate(MODES)}
    body, drawn = section(sample(), "Initial <weights>", "first-", places)
    assert [chart.id for chart in drawn] == ["first-error", "first-bias", "first-heat"]
    assert [trace.meta for trace in drawn[0].figure.data] == [7, 6, 5, 4, 3]
    assert body[0] == "<h2>Initial &lt;weights&gt;</h2>"
    assert curves.style(7).colour in "".join(body)
