"""The panels of a probe as data."""

import math
from typing import Any

import numpy as np
import pytest

from odd_probes import extreme, nothing_known, of_tensors
from roundoff.report.panels import HeatMap, Line, Marks, Panel, Stretch
from roundoff.report.plotly_painter import height
from roundoff.report.probe_panels import panels
from roundoff.report.probe_png import chosen
from roundoff.report.probe_view import heat
from samples import KS, MODES, TENSORS, sample

PARAMETERS = [name for name, (kind, _, _) in TENSORS.items() if kind == "parameter"]


def items(panel: Panel, kind: type) -> list[Any]:
    return [item for item in panel.items if isinstance(item, kind)]


@pytest.mark.parametrize(("place", "figure"), [(0, "error_to_noise"), (1, "bias")])
def test_errors_of_the_result_stand_in_their_rows(place: int, figure: str) -> None:
    result = sample()
    panel = panels(result)[place]
    ticks = panel.y.ticks
    assert [(tick.at, tick.text, tick.bold) for tick in ticks] == [
        (row - 1, name, row == 0) for row, name in enumerate(["all parameters", *PARAMETERS])
    ]
    assert panel.y.span == (len(PARAMETERS) - 0.5, -1.5)
    assert panel.x.log
    assert [(mark.name, mark.mode) for mark in items(panel, Marks)] == [(mode, i) for i, mode in enumerate(MODES)]
    for mode, mark in zip(MODES, items(panel, Marks), strict=True):
        of_mode = result["modes"][mode]
        wanted = [of_mode["total"], *(of_mode["tensors"][name] for name in PARAMETERS)]
        assert mark.x.tolist() == [values[figure] for values in wanted]
        assert mark.exact.tolist() == [values[f"{figure}_error"] for values in wanted]
        for row, values in enumerate(wanted):
            x, error = values[figure], values[f"{figure}_error"]
            s = (x + error) ** 2 - x**2
            bias = x - math.sqrt(max(0, x**2 - 2 * s)), math.sqrt(x**2 + 2 * s) - x
            down, up = (2 * error, 2 * error) if figure != "bias" else bias
            assert (mark.bars[0][row], mark.bars[1][row]) == pytest.approx((min(down, x), up), rel=1e-5)
        assert [round(row) for row in mark.y.tolist()] == list(range(-1, len(wanted) - 1))
        assert mark.texts == ("all parameters", *PARAMETERS)
        low, high = panel.x.span or (0, 0)
        assert all(low < x < high for x in mark.x)
    assert [(line.side, line.at) for line in items(panel, Line)] == ([("x", 1.0)] if place == 0 else [])
    stripes = [(stripe.side, stripe.low, stripe.high) for stripe in items(panel, Stretch)]
    assert stripes[:2] == [("y", -1.5, -0.5), ("y", 0.5, 1.5)]


def test_no_bar_reaches_0_where_there_is_no_place_for_it() -> None:
    result = sample()
    result["modes"]["manual"]["total"] |= {"bias": 1e-4, "bias_error": 3e-4}
    result["modes"]["manual"]["tensors"][PARAMETERS[0]] |= {"bias": 0.0, "bias_error": 1e-4}
    result["modes"]["manual"]["tensors"][PARAMETERS[1]] |= {"bias": 1e-4, "bias_error": None}
    mark = items(panels(result)[1], Marks)[1]
    assert mark.texts == ("all parameters", *PARAMETERS[1:])  # 0 has no mark
    down, up = mark.bars
    assert (down[0], up[0]) == pytest.approx((1e-4, math.sqrt(31e-8) - 1e-4), rel=1e-5)
    assert down[0] < 1e-4
    assert (down[1], up[1]) == (0, 0)


def test_shares_at_every_scale_and_the_window() -> None:
    result = sample()
    panel = panels(result)[2]
    (cells,), (triangles,) = items(panel, HeatMap), items(panel, Marks)
    assert [tick.text for tick in panel.y.ticks] == list(cells.texts) == list(TENSORS)
    assert list(cells.x) == KS
    assert np.array_equal(cells.z, heat(result))
    for row, name in enumerate(TENSORS):
        for place, what in enumerate(("flushed", "subnormal", "overflowed")):
            assert cells.exact[row, :, place].tolist() == result["scales"]["predicted"][name][what]
    assert cells.hover.format(text="logits", x=0, exact=[0.5, 0.25, 0.0]) == (
        "logits at 2^0: flushed 50.000%, subnormal 25.000%, overflowed 0.000%"
    )
    (frame,), (take,) = items(panel, Stretch), items(panel, Line)
    assert (frame.side, frame.low, frame.high, frame.fill) == ("x", 5.5, 15.5, None)  # whole cells of 2^6 to 2^15
    assert (take.side, take.at) == ("x", 11)
    assert (triangles.x.tolist(), triangles.mode) == ([7, 16], None)
    assert triangles.texts == ("manual", "fp16-optimizer-dynamic, amp-fp16")
    assert "from 2**6 to 2**15. Dotted: the scale to take, 2**11. Triangles above: the scales of man" in panel.caption
    assert panel.headline == "Lost in fp16 (predicted); frame: safe; dots: to take; triangles: of the modes"


def test_no_window_is_said() -> None:
    panel = panels(sample() | {"window": None, "scale": None})[2]
    assert items(panel, Stretch) == items(panel, Line) == []
    assert "No scale that was looked at serves every tensor." in panel.caption
    assert "Frame:" not in panel.caption
    assert "frame" not in panel.headline


def test_colours_of_flushing_and_overflow() -> None:
    """-1 all flushed, 0 neither, from 0.5 on overflow, which wins; logarithmic from a millionth on."""
    result = sample()
    shares = {
        "flushed": [1.0, 1e-3, 1e-9, 0.0, 0.9, 0.0],
        "overflowed": [0.0, 0.0, 0.0, 0.0, 1e-9, 1.0],
        "subnormal": [0.0] * 6,
    }
    result["scales"] |= {"k": list(range(6)), "predicted": dict.fromkeys(TENSORS, shares)}
    found = heat(result)
    assert found.shape == (len(TENSORS), 6)
    assert found[3] == pytest.approx([-1, -0.5, -0.02, 0, 0.51, 1])


def test_the_picture_has_a_row_for_every_tensor_in_both_panels() -> None:
    error, cells = chosen(sample())
    assert [tick.text for tick in error.y.ticks[1:]] == [tick.text for tick in cells.y.ticks] == list(TENSORS)
    assert [tick.at for tick in error.y.ticks[1:]] == [tick.at for tick in cells.y.ticks]
    assert [panel.id for panel in chosen(nothing_known())] == ["heat"]


def test_figures_that_are_not_known_or_extreme() -> None:
    error, bias, _ = panels(nothing_known())
    assert error.items == bias.items == ()
    assert error.caption == "No mode has a known error to noise above 0."
    span = panels(extreme())[0].x.span
    assert span == pytest.approx((10**-37.1, 10**37.1))


def test_forty_long_names_are_told_apart() -> None:
    error, _, cells = panels(of_tensors(40))
    for panel, count in ((error, 41), (cells, 40)):
        names = [tick.text for tick in panel.y.ticks]
        assert len(set(names)) == len(names) == panel.rows == count
        assert max(len(name) for name in names) <= 28
        assert (height(panel) or 0) > 20 * count


def test_modes_keep_the_style_that_they_have_elsewhere_in_the_page() -> None:
    found = panels(sample(), "first-", {mode: 7 - i for i, mode in enumerate(MODES)})
    assert [panel.id for panel in found] == ["first-error", "first-bias", "first-heat"]
    assert [mark.mode for mark in items(found[0], Marks)] == [7, 6, 5, 4, 3]
