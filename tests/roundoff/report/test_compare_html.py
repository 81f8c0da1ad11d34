import math
import random
from pathlib import Path

import numpy as np
import pytest

from comparisons import make_comparison, make_run
from pages import Page, numbers
from roundoff.report import curves
from roundoff.report.html import write_html
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Failure

NAMES = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "%{y} <b>bold</b> & $x$ \u202e",
    "a'b\"c",
)
FIGURES = ["loss", "difference", "size", "validation", "scale", "norm"]


def page_of(tmp_path: Path, comparison: Comparison) -> Page:
    path = tmp_path / "report.html"
    write_html(path, comparison)
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # nothing left beside it
    return Page(path.read_text(encoding="utf-8"))


def test_curves_stand_at_their_steps_with_exact_values_for_the_pointer(tmp_path: Path) -> None:
    fp32, fp16 = make_run("fp32"), make_run("manual", losses=[6.0, 5.5, 5.25 + 2**-20, 4.875])
    charts = page_of(tmp_path, make_comparison([fp32, fp16])).charts
    assert list(charts) == FIGURES
    reference, mode = charts["loss"]["data"]
    assert (reference["name"], reference["meta"], mode["name"], mode["meta"]) == ("fp32", 0, "manual", 1)
    assert numbers(reference["x"]) == [1, 2, 3, 4]
    assert numbers(mode["customdata"]) == fp16.steps["loss"]
    (difference,) = charts["difference"]["data"]
    assert numbers(difference["customdata"]) == [0, 0, 2**-20, -0.125]
    low, high = charts["difference"]["layout"]["yaxis"]["range"]
    assert low == -high == pytest.approx(-1.1 * 0.125)
    (size,) = charts["size"]["data"]
    assert numbers(size["y"]) == pytest.approx([math.nan, math.nan, 2**-20, 0.125], nan_ok=True)
    assert numbers(charts["validation"]["data"][1]["customdata"]) == [1, 2]


def test_a_mode_looks_the_same_in_every_figure_and_unlike_the_others(tmp_path: Path) -> None:
    runs = [make_run(f"mode-{i}", losses=[6.0, 5.0 + i / 8]) for i in range(8)]
    charts = page_of(tmp_path, make_comparison(runs)).charts
    looks: dict[int, set[tuple[str, str]]] = {}
    for figure in charts.values():
        for trace in figure["data"]:
            looks.setdefault(trace["meta"], set()).add((trace["line"]["color"], trace["line"]["dash"]))
    assert sorted(looks) == list(range(8))
    assert all(len(look) == 1 for look in looks.values())
    assert len({colour for look in looks.values() for colour, _ in look}) == 8
    assert len({dash for look in looks.values() for _, dash in look}) == 8


def test_skipped_steps_keep_their_place_and_are_marked(tmp_path: Path) -> None:
    run = make_run("amp-fp16", applied=[False, True, False, True], scales=[65536.0, 32768.0, 32768.0, 16384.0])
    charts = page_of(tmp_path, make_comparison([run])).charts
    line, crosses = charts["scale"]["data"]
    assert numbers(line["x"]) == [1, 2, 3, 4]
    assert numbers(line["y"]) == [65536, 32768, 32768, 16384]
    assert (numbers(crosses["x"]), numbers(crosses["y"])) == ([1, 3], [65536, 32768])
    assert charts["scale"]["layout"]["yaxis"]["ticktext"] == ["2<sup>14</sup>", "2<sup>15</sup>", "2<sup>16</sup>"]
    assert numbers(charts["norm"]["data"][0]["y"]) == pytest.approx([math.nan, 0.25] * 2, nan_ok=True)


def test_names_are_text_and_never_markup(tmp_path: Path) -> None:
    runs = [
        make_run(name, config={"model": name, "<b>flag</b>": name}, path=Path(name), problems=[name]) for name in NAMES
    ]
    failure = Failure(NAMES[0] + "!", 1, [NAMES[1]], 1, NAMES[0])
    page = page_of(tmp_path, make_comparison(runs, [failure], differences=list(NAMES)))
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "object")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert len(page.scripts) == 3
    for name in NAMES[:2]:
        assert page.text.count(name) >= 6
    names = [trace["name"] for trace in page.charts["loss"]["data"]]
    assert names[:2] == ["&lt;img src=x onerror=alert(1)&gt;", "&lt;/script&gt;&lt;script&gt;alert(2)&lt;/script&gt;"]
    assert names[2] == r"%{y} &lt;b&gt;bold&lt;/b&gt; &amp; $x$ \u202e"  # what turns text around is spelt out
    assert not any("alert" in trace["hovertemplate"] for trace in page.charts["loss"]["data"])


def test_the_page_runs_its_two_scripts_only_and_fetches_nothing(tmp_path: Path) -> None:
    page = page_of(tmp_path, make_comparison([make_run("fp32"), make_run("manual")]))
    page.runs_only_its_scripts()


def test_what_is_not_finite_leaves_a_gap(tmp_path: Path) -> None:
    losses = [6.0, 1e30, math.inf, math.nan, -math.inf, 3e38]
    run = make_run(
        "amp-bf16", losses=losses, norms=[math.nan] * 6, scales=[math.inf, 0.0, math.nan, -1.0, 1.0, 1.0],
        epochs=[800.0, 5.0], status="diverged",
    )  # fmt: skip
    charts = page_of(tmp_path, make_comparison([make_run("fp32", losses=[6.0] * 6), run])).charts
    drawn = numbers(charts["loss"]["data"][1]["y"])
    assert [math.isfinite(value) for value in drawn] == [True, True, False, False, False, True]
    assert charts["loss"]["layout"]["yaxis"]["range"] == pytest.approx([5.7, 6.3])  # the steady run's
    assert numbers(charts["validation"]["data"][1]["y"]) == pytest.approx([math.nan, math.exp(5)], nan_ok=True)


def test_seeds_share_a_colour_and_the_references_make_a_band(tmp_path: Path) -> None:
    offsets = {1: 0.0, 2: 0.5, 3: -0.25}
    runs = [make_run("fp32", seed, [6.0 + more, 5.0 + more]) for seed, more in offsets.items()]
    runs += [make_run("manual", seed, [6.125 + more, 5.0 + more]) for seed, more in offsets.items()]
    page = page_of(tmp_path, make_comparison(runs))
    lower, upper, *lines = page.charts["loss"]["data"]
    assert (numbers(lower["y"]), numbers(upper["y"]), upper["fill"]) == ([5.75, 4.75], [6.5, 5.5], "tonexty")
    assert len(lines) == 6
    strong = [line["meta"] for line in lines if line["line"]["width"] == 2]
    assert strong == [0, 1]
    lower, upper, *lines = page.charts["difference"]["data"]
    mean = sum(offsets.values()) / 3
    assert numbers(lower["y"]) == pytest.approx([-0.25 - mean] * 2)
    assert numbers(upper["y"]) == pytest.approx([0.5 - mean] * 2)
    assert [numbers(line["y"]) for line in lines] == [[0.125, 0.0]] * 3
    assert "least to greatest smoothed loss of the 3 seeds of the reference" in page.text


@pytest.mark.parametrize(
    ("runs", "figures"),
    [
        ([make_run("fp32")], ["loss", "validation", "scale", "norm"]),
        ([make_run("fp32", losses=[6.0], epochs=[])], ["loss", "scale", "norm"]),
        ([make_run("fp32"), make_run("manual")], ["loss", "difference", "validation", "scale", "norm"]),  # bit-equal
        ([make_run("fp32"), make_run("manual", seed=2)], ["loss", "validation", "scale", "norm"]),
        ([make_run("fp32", losses=[math.nan]), make_run("manual", losses=[math.inf])], FIGURES[:2] + FIGURES[3:]),
    ],
)
def test_a_figure_without_anything_to_draw_says_so(tmp_path: Path, runs: list[Run], figures: list[str]) -> None:
    page = page_of(tmp_path, make_comparison(runs))
    assert list(page.charts) == figures
    assert [attrs["id"] for tag, attrs in page.tags if tag == "div" and "id" in attrs] == figures
    empty = {"difference": "No other mode", "size": "No step differs", "validation": "No run has completed an epoch"}
    for name, sentence in empty.items():
        assert (sentence in page.text) == (name not in figures)


def test_failures_alone_make_a_page_without_scripts(tmp_path: Path) -> None:
    failure = Failure("fp32", 1111, ["python", "main.py", "--data", "a b"], 2, "error: there is no such directory")
    page = page_of(tmp_path, make_comparison([], [failure]))
    assert "fp32, seed 1111: failed with exit code 2: error: there is no such directory" in page.text
    assert "python main.py --data 'a b'" in page.text
    assert [text for _, text in page.scripts] == ["[]"]


def test_the_page_says_what_was_found_and_how_each_run_was_made(tmp_path: Path) -> None:
    runs = [make_run("fp32", problems=["last line cut"]), make_run("manual", applied=[False, True, True, True])]
    page = page_of(tmp_path, make_comparison(runs, differences=["lr is 20 in a, 10 in b"]))
    for text in (
        "manual is equivalent to the reference.",
        "fp32 = manual: bit-equal",
        "Covers seeds.",
        "last line cut",
    ):
        assert text in page.text
    assert "lr is 20 in a, 10 in b" in page.text
    assert "-0.0010[-0.0030, +0.0010]" in page.text
    assert page.text.count("job corpus sha256 train") == 2
    assert page.text.count("environment command") == 2
    assert "main.py --seed 1111" in page.text
    marked = [attrs for tag, attrs in page.tags if tag == "tr" and attrs.get("class") == "differs"]
    differing = ["mode", "dtype", "loss_scale", "equals", *("weights", "hidden", "logits", "gradients")]
    assert len(marked) == 2 * len([*differing, "fp16"])


def test_a_long_run_keeps_its_extremes_and_a_bearable_size(tmp_path: Path) -> None:
    count, rng = 30_000, random.Random(0)
    losses = [5.0 + rng.gauss(0, 0.1) for _ in range(count)]
    losses[12_345], losses[23_456] = 9.0, 1.0
    applied = [rng.random() > 0.2 for _ in range(count)]
    scales = [2.0 ** (i % 17) for i in range(count)]
    runs = [
        make_run(f"mode-{i}", losses=[x + i / 64 for x in losses], applied=applied, scales=scales) for i in range(6)
    ]
    page = page_of(tmp_path, make_comparison(runs))
    for figure in page.charts.values():
        for trace in figure["data"]:
            assert len(numbers(trace["y"])) <= 2 * curves.POINTS
    raw = page.charts["loss"]["data"][0]
    at = dict(zip(numbers(raw["x"]), numbers(raw["y"]), strict=True))
    assert (at[12_346], at[23_457]) == (9.0, 1.0)
    smoothed = page.charts["loss"]["data"][6]
    step, exact = numbers(smoothed["x"])[1000], numbers(smoothed["customdata"])[1000]
    assert exact == losses[int(step) - 1]
    assert (tmp_path / "report.html").stat().st_size < 8_000_000


def test_smoothing_is_the_mean_of_the_finite_values_around() -> None:
    values = np.array([1.0, 2.0, np.nan, 4.0, 1e30, 6.0, 7.0, 8.0])
    smoothed = curves.smooth(values, 3)
    assert smoothed[[0, 1, 3, 6, 7]] == pytest.approx([1.5, 1.5, 5e29, 7.0, 7.5])
    assert np.isnan(smoothed[2])
    assert curves.smooth(values[:2], 9) == pytest.approx([1.5, 1.5])  # a window longer than the run
    assert curves.smooth(values, 1) == pytest.approx(values, nan_ok=True)


def test_runs_are_aligned_by_step_and_not_by_row() -> None:
    reference, run = make_run("fp32", losses=[6.0, 5.0, 4.0]), make_run("manual", losses=[5.5, 4.5])
    run.steps["step"][:] = [2, 3]
    (mode, _) = curves.modes(make_comparison([reference, run]))
    found = curves.difference(run, mode)
    assert found is not None
    assert found[0].tolist() == [2, 3]
    assert found[1].tolist() == [0.5, 0.5]


def test_a_single_step_can_be_seen(tmp_path: Path) -> None:
    charts = page_of(
        tmp_path, make_comparison([make_run("fp32", losses=[6.0]), make_run("manual", losses=[5.0])])
    ).charts
    assert list(charts) == FIGURES
    assert all("markers" in trace["mode"] for figure in charts.values() for trace in figure["data"])
