"""The panels of a comparison as data: every number, range and caption that a page or a picture shows."""

import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from comparisons import make_comparison, make_run
from roundoff.report import curves
from roundoff.report.comparison_panels import panels
from roundoff.report.panels import Band, Curve, Line, Marks, Panel, Stretch, style
from roundoff.report.plotly_painter import height
from roundoff.report.png import chosen
from roundoff.runs.reading import Run
from roundoff.verdict.types import Verdict

PANELS = ["loss", "difference", "size", "validation", "scale", "norm"]
"""Without that of the verdicts, which is the first one where there are verdicts."""
NAN, INF = math.nan, math.inf


def drawn(*runs: Run, detailed: bool = True) -> dict[str, Panel]:
    found = {panel.id: panel for panel in panels(make_comparison(runs), detailed)}
    assert (list(found)[:1] == ["verdicts"]) == (len({run.label for run in runs}) > 1)
    return {name: panel for name, panel in found.items() if name != "verdicts"}


def items(panel: Panel, kind: type) -> list[Any]:
    return [item for item in panel.items if isinstance(item, kind)]


def same(found: Any, wanted: Any) -> bool:
    return bool(np.asarray(found).tolist() == pytest.approx(wanted, nan_ok=True))


def test_curves_stand_at_their_steps_with_exact_values_for_the_pointer() -> None:
    fp16 = make_run("manual", losses=[6.0, 5.5, 5.25 + 2**-20, 4.875])
    found = drawn(make_run("fp32"), fp16)
    assert list(found) == PANELS
    assert [panel.over_steps for panel in found.values()] == [True, True, True, False, True, True]
    reference, mode = items(found["loss"], Curve)
    assert (reference.name, reference.mode, mode.name, mode.mode) == ("fp32", 0, "manual", 1)
    assert same(reference.x, [1, 2, 3, 4])
    assert same(mode.y, fp16.steps["loss"])
    assert mode.exact.tolist() == fp16.steps["loss"]
    said = mode.hover.format(y=mode.y[2], exact=mode.exact[2])
    assert said == "5.25 (this step exactly 5.25000095)"
    (difference,) = items(found["difference"], Curve)
    assert difference.exact.tolist() == difference.y.tolist() == [0, 0, 2**-20, -0.125]
    assert found["difference"].y.span == pytest.approx((-1.1 * 0.125, 1.1 * 0.125))
    assert [(line.side, line.at) for line in items(found["difference"], Line)] == [("x", 2.5), ("y", 0)]
    (size,) = items(found["size"], Curve)
    assert same(size.y, [NAN, NAN, 2**-20, 0.125])
    assert found["size"].y.log
    validation = items(found["validation"], Curve)[1]
    assert validation.hover.format(y=validation.y[1], exact=validation.exact[1]) == "epoch 2: 148.413"
    assert same(validation.x, [1.025, 2.025])  # beside the reference's
    assert found["validation"].x.span == (0.6, 2.4)
    assert found["loss"].x.span == (0.5, 4.5)
    assert items(found["loss"], Line)[0] == Line("x", 2.5, "#bbbbbb", 1, dotted=True)


FOREST: dict[str, tuple[Verdict, str, list[float]]] = {
    "equivalent": (Verdict("equivalent", "", 3, 0.001, (-0.004, 0.006), 0.01), "m", [0.001, -0.004, 0.006]),
    "undecided": (Verdict("undecided", "", 3, 0.0, (-0.05, 0.05), 0.4), "m", [0.0, -0.05, 0.05]),
    "diverged": (Verdict("diverged", "", 3, -9.0, (-10.0, -8.0)), "m: diverged", []),
    "not finished": (Verdict("not finished", ""), "m: not finished", []),
}
"""Verdict -> its tick, and mean, least and greatest of the mark."""


@pytest.mark.parametrize("case", FOREST)
def test_intervals_stand_against_the_margin(case: str) -> None:
    """A mode that diverged has no mark: the mean of its other seeds would hide that."""
    verdict, name, wanted = FOREST[case]
    comparison = make_comparison([make_run("fp32"), make_run("bf16"), make_run("m")])
    comparison.modes[2] = replace(comparison.modes[2], verdict=verdict)
    panel = panels(comparison)[0]
    assert (panel.id, panel.rows) == ("verdicts", 2)
    assert [(tick.at, tick.text) for tick in panel.y.ticks] == [(0, "bf16"), (1, name)]
    assert items(panel, Line) == [Line("x", 0.0)]
    assert [(band.side, band.low, band.high) for band in items(panel, Stretch)] == [("x", -0.01, 0.01)]
    first, *others = items(panel, Marks)
    assert (first.mode, first.y.tolist(), first.texts) == (1, [0], ("equivalent: -0.0010 nats [-0.0030, +0.0010]",))
    marks = [(m.mode, m.y.tolist(), [*m.x, m.x[0] - m.bars[0][0], m.x[0] + m.bars[1][0]]) for m in others]
    assert marks == ([(2, [1], pytest.approx(wanted))] if wanted else [])
    reach = 1.1 * max(map(abs, [0.01, *wanted]))
    assert panel.x.span == pytest.approx((-reach, reach))


def test_a_row_is_no_higher_for_marks_in_other_rows() -> None:
    panel = panels(make_comparison([make_run(f"mode-{i}") for i in range(9)]))[0]
    assert (panel.rows, height(panel)) == (8, 8 * 26 + 84)


def test_without_a_verdict_there_are_no_intervals() -> None:
    comparison = make_comparison([make_run("fp32"), make_run("m")])
    comparison.modes[1] = replace(comparison.modes[1], verdict=Verdict("described", "", 2, 0.0, (-1.0, 1.0)))
    assert [panel.id for panel in panels(comparison)] == PANELS


def test_a_mode_is_told_from_the_others_by_colour_dash_and_marker() -> None:
    looks = [style(i) for i in range(16)]
    assert len({look.colour for look in looks[:8]}) == len({look.dash for look in looks[:8]}) == 8
    assert len({look.marker for look in looks[:8]}) == 8
    assert len({(look.colour, look.dash) for look in looks}) == 16
    found = drawn(*(make_run(f"mode-{i}", losses=[6.0, 5.0 + i / 8]) for i in range(8)))
    for panel in found.values():
        assert {curve.name: curve.mode for curve in items(panel, Curve)}.items() <= {
            f"mode-{i}": i for i in range(8)
        }.items()


def test_skipped_steps_keep_their_place_and_are_marked() -> None:
    run = make_run("amp-fp16", applied=[False, True, False, True], scales=[65536.0, 32768.0, 32768.0, 16384.0])
    found = drawn(run)
    (line,), (crosses,) = items(found["scale"], Curve), items(found["scale"], Marks)
    assert (line.x.tolist(), line.y.tolist(), line.steps) == ([1, 2, 3, 4], [65536, 32768, 32768, 16384], True)
    assert (crosses.x.tolist(), crosses.y.tolist(), crosses.shape) == ([1, 3], [65536, 32768], "cross")
    assert crosses.hover.format(y=crosses.y[0]) == "skipped at 65536"
    axis = found["scale"].y
    assert [(tick.at, tick.text, tick.exponent) for tick in axis.ticks] == [(2.0**k, "2", str(k)) for k in (14, 15, 16)]
    assert axis.span == (2.0**13, 2.0**17)
    (norm,) = items(found["norm"], Curve)
    assert same(norm.y, [NAN, 0.25, NAN, 0.25])


def test_what_is_not_finite_leaves_a_gap_and_a_diverged_run_moves_no_limit() -> None:
    losses = [6.0, 1e30, INF, NAN, -INF, 3e38]
    more = {"norms": [NAN] * 6, "scales": [INF, 0.0, NAN, -1.0, 1.0, 1.0], "epochs": [800.0, 5.0]}
    found = drawn(make_run("fp32", losses=[6.0] * 6), make_run("amp-bf16", losses=losses, status="diverged", **more))
    assert np.isfinite(items(found["loss"], Curve)[1].y).tolist() == [True, True, False, False, False, True]
    assert found["loss"].y.span == pytest.approx((5.7, 6.3))
    assert found["difference"].y.span == (-1e-3, 1e-3)
    assert same(items(found["validation"], Curve)[1].y, [NAN, math.exp(5)])
    low, high = drawn(make_run("fp32", losses=[5.0] * 39 + [1e30], status="diverged"))["loss"].y.span or (0, 0)
    assert (low, high) == pytest.approx((4.75, 5.25))


def test_seeds_share_a_style_and_the_references_make_a_band() -> None:
    offsets = {1: 0.0, 2: 0.5, 3: -0.25}
    runs = [make_run("fp32", seed, [6.0 + more, 5.0 + more]) for seed, more in offsets.items()]
    runs += [make_run("manual", seed, [6.125 + more, 5.0 + more]) for seed, more in offsets.items()]
    found = drawn(*runs)
    (band,), lines = items(found["loss"], Band), items(found["loss"], Curve)
    assert (band.x.tolist(), band.low.tolist(), band.high.tolist()) == ([1, 2], [5.75, 4.75], [6.5, 5.5])
    assert [(line.mode, line.weight) for line in lines] == [(0, "thin")] * 2 + [(1, "thin")] * 2 + [
        (0, "strong"),
        (1, "strong"),
    ]
    assert [bool(line.hover) for line in lines] == [False] * 4 + [True] * 2
    (band,), lines = items(found["difference"], Band), items(found["difference"], Curve)
    mean = sum(offsets.values()) / 3
    assert same(band.low, [-0.25 - mean] * 2)
    assert same(band.high, [0.5 - mean] * 2)
    assert [line.y.tolist() for line in lines] == [[0.125, 0.0]] * 3
    assert "least to greatest smoothed loss of the 3 seeds of the reference" in found["loss"].caption
    assert "grey: all 3 seeds of the reference" in found["loss"].headline


@pytest.mark.parametrize(
    ("runs", "names"),
    [
        ([make_run("fp32")], ["loss", "validation", "scale", "norm"]),
        ([make_run("fp32", losses=[6.0], epochs=[])], ["loss", "scale", "norm"]),
        ([make_run("fp32"), make_run("manual")], ["loss", "difference", "validation", "scale", "norm"]),  # bit-equal
        ([make_run("fp32"), make_run("manual", seed=2)], ["loss", "validation", "scale", "norm"]),
        ([make_run("fp32", losses=[NAN]), make_run("manual", losses=[INF])], PANELS[:2] + PANELS[3:]),
        ([make_run("fp32", norms=[0.0] * 4, scales=[NAN] * 4)], ["loss", "validation"]),
        ([], []),
    ],
)
def test_a_panel_without_anything_to_draw_says_so(runs: list[Run], names: list[str]) -> None:
    found = drawn(*runs) if runs else {}
    assert [name for name, panel in found.items() if panel.items] == names
    sentences = ["No other mode has", "No step differs", "No run has completed an epoch", "No run has a loss scale"]
    for name, sentence in zip(PANELS[1:], [*sentences, "No run has a finite gradient norm"], strict=True):
        assert name in names or not runs or found[name].caption.startswith(sentence)


def test_the_picture_has_the_main_panels_with_fewer_details() -> None:
    one, two = make_run("fp32", epochs=[], losses=[5.0] * 200), make_run("manual", losses=[5.5] * 200)
    dynamic = make_run("amp-fp16", losses=[5.0] * 200, scales=[4.0] + [2.0] * 199)
    wanted = [
        ([one], [["loss"]]),
        ([one, two], [["verdicts"], ["loss"], ["difference"], ["validation"]]),
        ([one, dynamic], [["verdicts"], ["loss"], ["difference"], ["validation", "scale"]]),
    ]
    for runs, ids in wanted:
        assert [[panel.id for panel in row] for row in chosen(make_comparison(runs))] == ids
    ((loss,),) = chosen(make_comparison([one]))
    assert len(loss.items) == 1  # neither single steps nor the ends of the epochs
    assert loss.headline == "Training loss, mean of 5 steps"


def test_a_long_run_keeps_its_extremes_and_every_change_of_the_scale() -> None:
    count, rng = 30_000, random.Random(0)
    losses = [5.0 + rng.gauss(0, 0.1) for _ in range(count)]
    losses[12_345], losses[23_456] = 9.0, 1.0
    scales = [2.0 ** (i // 100 % 17) for i in range(count)]
    found = drawn(make_run("fp32", losses=losses, scales=scales))
    pale, line = items(found["loss"], Curve)
    assert (pale.weight, len(line.x)) == ("pale", curves.POINTS)
    at = dict(zip(pale.x.tolist(), pale.y.tolist(), strict=True))
    assert (at[12_346], at[23_457], len(at) <= curves.POINTS) == (9.0, 1.0, True)
    assert line.exact[1000] == losses[line.x[1000] - 1]
    low, high = found["loss"].y.span or (0, 0)
    assert 4.5 < low < 4.8 < 5.2 < high < 5.5  # of all single steps but the rarest
    (scale,) = items(found["scale"], Curve)
    at = dict(zip(scale.x.tolist(), scale.y.tolist(), strict=True))
    assert all(at[i] == scales[i - 1] for k in range(100, count, 100) for i in (k, k + 1))
    assert (min(at), max(at)) == (1, count)
    (scale,) = items(
        drawn(make_run("fp32", losses=losses, scales=[2.0 ** (i % 3) for i in range(count)]))["scale"], Curve
    )
    assert len(scale.x) == 2 * curves.POINTS


def test_smoothing_is_the_mean_of_the_finite_values_around() -> None:
    values = np.array([1.0, 2.0, NAN, 4.0, 1e30, 6.0, 7.0, 8.0])
    smoothed = curves.smooth(values, 3)
    assert smoothed[[0, 1, 3, 6, 7]] == pytest.approx([1.5, 1.5, 5e29, 7.0, 7.5])
    assert np.isnan(smoothed[2])
    assert curves.smooth(values[:2], 9) == pytest.approx([1.5, 1.5])  # a window longer than the run
    assert curves.smooth(values, 1) == pytest.approx(values, nan_ok=True)
    windows = [curves.window(curves.modes(make_comparison([make_run("a", losses=[5.0] * n)]))) for n in (99, 100, 150)]
    assert windows == [1, 3, 3]
    line = items(drawn(make_run("a", losses=[float(i * i) for i in range(100)], norms=[1.0, 4.0] * 50))["norm"], Curve)[
        1
    ]
    assert line.y[1:3].tolist() == pytest.approx([4 ** (1 / 3), 4 ** (2 / 3)])  # a geometric mean


def test_runs_are_aligned_by_step_and_not_by_row() -> None:
    run = make_run("manual", losses=[5.5, 4.5])
    run.steps["step"][:] = [2, 3]
    (line,) = items(drawn(make_run("fp32", losses=[6.0, 5.0, 4.0]), run)["difference"], Curve)
    assert (line.x.tolist(), line.y.tolist()) == ([2, 3], [0.5, 0.5])
