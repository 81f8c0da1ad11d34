"""Both painters draw a panel as it is described, and odd comparisons and probes without a warning."""

import base64
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("matplotlib", reason="this environment lacks matplotlib, of the extra report")
pytest.importorskip("plotly", reason="this environment lacks plotly, of the extra report")

import matplotlib as mpl
import numpy as np
import plotly.graph_objects as go
from matplotlib.colors import to_hex, to_rgb
from matplotlib.image import imread

from comparisons import make_comparison, make_run
from odd_probes import empty, extreme, nothing_known, of_tensors, renamed
from roundoff.report import matplotlib_painter, plotly_painter, png, probe_png
from roundoff.report.comparison_panels import panels
from roundoff.report.panels import Axis, Band, Curve, HeatMap, Line, Marks, Panel, Stretch, Tick, style
from roundoff.report.probe_panels import panels as probe_panels
from roundoff.verdict.types import Comparison, Failure
from samples import sample

X, Y = np.array([1, 2, 3]), np.array([4.0, nan, 1.0])
SHADES, COLOURS = {-1.0: "cold", 1.0: "hot"}, ((0.0, "#0000ff"), (0.5, "#ffffff"), (1.0, "#ff0000"))
TICKS = (Tick(-1, "all $", bold=True), Tick(0, "<b>", ""), Tick(1, "2", "7"))
PANELS = {
    "curves": Panel(
        "curves", "Curves", "What they are.", "Curves; grey: a band",
        Axis("steps", (0.5, 3.5), whole=True),
        Axis("loss", (0.5, 4.5)),
        (
            Line("x", 1.5, "#bbbbbb", 1, dotted=True),
            Line("y", 0.0),
            Band(0, X, np.array([1.0, 2.0, 3.0]), np.array([2.0, 3.0, 5.0])),
            Curve(1, "b", X, Y * 2, "pale", markers="none"),
            Curve(1, "b", X, Y, "thin"),
            Curve(0, "a", X, Y + 1, "strong", "{y:.5g} ({exact:.9g})", exact=Y),
        ),
        over_steps=True,
    ),
    "scale": Panel(
        "scale", "Scale", "", "Scale",
        Axis("steps", (0.5, 3.5), whole=True),
        Axis("scale", (1.0, 256.0), log=True, ticks=(Tick(2.0, "2", "1"), Tick(128.0, "2", "7"))),
        (
            Curve(2, "c", X, np.array([2.0, 128.0, 2.0]), markers="none", steps=True),
            Marks(2, "c, skipped", X[:2], np.array([2.0, 128.0]), "cross", hover="skipped at {y:g}"),
        ),
    ),
    "rows": Panel(
        "rows", "Rows", "", "Rows", Axis("error", (0.1, 100.0), log=True), Axis("", (1.5, -1.5), ticks=TICKS),
        (
            Stretch("y", -1.5, -0.5, "#f6f6f4"),
            Marks(
                3, "d", np.array([1.0, 10.0]), np.array([-1.0, 1.0]), hover="{text}: {x:.3g}", texts=("<i>", "z"),
                exact=np.array([0.25, 0.5]), bars=(np.array([0.5, 5.0]), np.array([0.75, 20.0])),
            ),
            Line("x", 1.0, "#888888", 1, dotted=True),
        ),
        rows=3,
    ),
    "heat": Panel(
        "heat", "Heat", "", "Heat", Axis("k", (-1.5, 1.5), ticks=(Tick(0, "2", "0"),)),
        Axis("", (1.5, -0.5), ticks=TICKS[1:]),
        (
            HeatMap(
                (-1, 0, 1), np.array([[-1.0, 0.0, 1.0], [0.5, -0.5, 0.25]]), COLOURS, SHADES,
                "{text} at 2^{x}: {exact[1]:.3%}", ("<i>", "z"), np.arange(12.0).reshape(2, 3, 2) / 12,
            ),
            Stretch("x", -0.5, 0.5),
            Line("x", 1),
            Marks(None, "", np.array([0.0]), np.array([-0.5]), "triangle", hover="of {text}", texts=("a, b",)),
        ),
        rows=2,
    ),
}  # fmt: skip
"""Every kind of item and of axis."""

Facts = list[tuple[str, Any]]


def listed(*values: Any) -> Any:
    """Numbers as lists of float32, as which a page has them."""
    return [np.nan_to_num(np.asarray(value, dtype=np.float32), nan=-99.0).tolist() for value in values]


def described(panel: Panel) -> Facts:
    found: Facts = []
    for item in panel.items:
        match item:
            case Curve():
                found.append((style(item.mode).colour, listed(item.x, item.y)))
            case Band():
                found.append(("band", listed(item.x, item.low, item.high)))
            case Marks():
                colour = "#000000" if item.mode is None else style(item.mode).colour
                bars = [] if item.bars is None else [item.x - item.bars[0], item.x + item.bars[1]]
                found.append((colour, listed(item.x, item.y, *bars)))
            case HeatMap():
                found.append(("heat", listed(item.z.ravel())))
            case Line():
                found.append((f"line {item.side} {item.colour}", listed(item.at)))
            case Stretch():
                found.append((f"stretch {item.side} {item.fill}", listed(item.low, item.high)))
    return sorted(found, key=str)


def array(value: Any) -> Any:
    if isinstance(value, dict):
        value = np.frombuffer(base64.b64decode(value["bdata"]), dtype=value["dtype"])
    return np.asarray(value, dtype=np.float32)


def by_plotly(figure: Any) -> Facts:
    found: Facts = []
    traces = list(figure["data"])
    for i, trace in enumerate(traces):
        if trace["type"] == "heatmap":
            found.append(("heat", listed(array(trace["z"]).ravel())))
        elif trace.get("fill") == "tonexty":
            found.append(("band", listed(*(array(edge) for edge in (trace["x"], traces[i - 1]["y"], trace["y"])))))
        elif trace["mode"] == "markers":
            x, bars = array(trace["x"]), trace.get("error_x")
            ends = [x - array(bars["arrayminus"]), x + array(bars["array"])] if bars else []
            found.append((trace["marker"]["color"], listed(x, array(trace["y"]), *ends)))
        elif trace["line"]["width"]:
            found.append((trace["line"]["color"], listed(array(trace["x"]), array(trace["y"]))))
    for shape in figure["layout"].get("shapes", []):
        (side,) = (side for side in "xy" if shape.get(f"{side}ref") != "paper")
        low, high = shape[f"{side}0"], shape[f"{side}1"]
        colour = shape["line"]["color"]
        name = f"line {side} {colour}" if shape["type"] == "line" else f"stretch {side} {shape.get('fillcolor')}"
        found.append((name, listed(low) if shape["type"] == "line" else listed(low, high)))
    return sorted(found, key=str)


def by_matplotlib(axis: Any) -> Facts:
    found: Facts = []
    bars = {container.lines[0]: container.lines[2][0] for container in axis.containers}
    for line in axis.lines:
        x, y = np.asarray(line.get_xdata()), np.asarray(line.get_ydata())
        sides = [s for s, t in zip("xy", (axis.get_xaxis_transform(), axis.get_yaxis_transform()), strict=True)
                 if line.get_transform() == t]  # fmt: skip
        if sides:
            found.append((f"line {sides[0]} {line.get_color()}", listed((x if sides == ["x"] else y)[0])))
        else:
            ends = np.array(bars[line].get_segments())[:, :, 0].T if line in bars else []
            found.append((line.get_color(), listed(x, y, *ends)))
    for patch in axis.patches:
        across = patch.get_height() == 1 and patch.get_y() == 0
        low, size = (patch.get_x(), patch.get_width()) if across else (patch.get_y(), patch.get_height())
        fill = to_hex(patch.get_facecolor()) if patch.get_fill() else None
        found.append((f"stretch {'x' if across else 'y'} {fill}", listed(low, low + size)))
    for drawn in axis.collections:
        if type(drawn).__name__ == "QuadMesh":
            found.append(("heat", listed(drawn.get_array().ravel())))
        elif drawn not in bars.values():
            points = np.unique(drawn.get_paths()[0].vertices, axis=0)
            x = np.unique(points[:, 0])
            edges = [[f(points[points[:, 0] == at, 1]) for at in x] for f in (np.min, np.max)]
            found.append(("band", listed(x, *edges)))
    return sorted(found, key=str)


@pytest.mark.parametrize("panel", PANELS.values(), ids=list(PANELS))
def test_plotly_draws_what_is_described(panel: Panel) -> None:
    figure = go.Figure(plotly_painter.paint(panel)).to_plotly_json()  # which refuses a misspelt property
    assert by_plotly(figure) == described(panel)
    layout = figure["layout"]
    for axis, drawn in ((panel.x, layout["xaxis"]), (panel.y, layout["yaxis"])):
        ends = np.log10(axis.span or ()) if axis.log else axis.span
        assert list(drawn["range"]) == pytest.approx(list(ends or ()) if not axis.log else ends)
        assert (drawn.get("type") == "log", drawn["title"]["text"]) == (axis.log, axis.label)
        assert list(drawn.get("tickvals", [])) == [tick.at for tick in axis.ticks]
        assert drawn.get("dtick") == (1 if axis.whole or (axis.log and not axis.ticks) else None)
    assert layout["hovermode"] == ("x unified" if panel.over_steps else "closest")


def test_plotly_shows_names_as_text_and_exact_values_at_the_pointer() -> None:
    data = {name: plotly_painter.paint(panel)["data"] for name, panel in PANELS.items()}
    low, high, pale, thin, strong = data["curves"]
    assert strong["hovertemplate"] == "%{y:.5~g} (%{customdata:.9~g})"
    assert (strong["meta"], strong["opacity"], strong["mode"], strong["line"]["width"]) == (0, 1, "lines+markers", 2)
    assert (thin["hoverinfo"], thin["opacity"], thin["line"]["width"], thin["line"]["dash"]) == (
        "skip",
        0.45,
        1,
        "8px,3px",
    )
    assert (pale["hoverinfo"], pale["opacity"], pale["mode"]) == ("skip", 0.1, "lines")
    assert low["meta"] == high["meta"] == 0
    assert data["scale"][0]["line"]["shape"] == "hv"
    assert data["rows"][0]["text"] == ["&lt;i&gt;", "z"]
    assert data["heat"][0]["hovertemplate"] == "%{text} at 2<sup>%{x}</sup>: %{customdata[1]:.3~%}<extra></extra>"
    assert data["heat"][0]["text"] == [["&lt;i&gt;"] * 3, ["z"] * 3]
    assert data["heat"][0]["colorbar"]["ticktext"] == ["cold", "hot"]
    assert data["heat"][1]["meta"] is None
    assert plotly_painter.paint(PANELS["rows"])["layout"]["yaxis"]["ticktext"] == [
        "<b>all $</b>",
        "&lt;b&gt;",
        "2<sup>7</sup>",
    ]
    one = Panel("p", "", "", items=(Curve(0, "a", X[:1], Y[:1], markers="none"),))
    assert plotly_painter.paint(one)["data"][0]["mode"] == "lines+markers"  # a single point can be seen
    layers = [shape["layer"] for shape in plotly_painter.paint(PANELS["rows"])["layout"]["shapes"]]
    assert layers == ["below", "above"]


def test_matplotlib_draws_what_is_described() -> None:
    grid = [[PANELS["curves"]], [PANELS["scale"]], [PANELS["rows"], PANELS["heat"]]]
    figure = matplotlib_painter.paint(grid, [(0, "a"), (1, "b")])
    figure.draw_without_rendering()
    axes = dict(zip(PANELS, figure.axes, strict=False))
    for name, panel in PANELS.items():
        axis = axes[name]
        assert by_matplotlib(axis) == described(panel), name
        assert axis.get_title(loc="left") == panel.headline
        assert axis.get_xlim() == pytest.approx(panel.x.span)
        assert axis.get_xscale() == ("log" if panel.x.log else "linear")
        if name != "heat":  # which shares the rows of its neighbour
            assert axis.get_ylim() == pytest.approx(panel.y.span)
            assert axis.get_yscale() == ("log" if panel.y.log else "linear")
    assert axes["heat"].get_ylim() == axes["rows"].get_ylim()
    assert [label.get_text() for label in axes["rows"].get_yticklabels()] == [r"all \$", "<b>", "$2^{7}$"]
    assert axes["rows"].get_yticklabels()[0].get_fontweight() == "bold"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b"]
    assert axes["scale"].lines[0].get_drawstyle() == "steps-post"


def test_the_legend_is_read_from_left_to_right() -> None:
    """Matplotlib fills one column after the other."""
    names = ["a", "b", "c", "d", "e", "f"]
    figure = matplotlib_painter.paint([[PANELS["curves"]]], list(enumerate(names)), ["It is 2^11 $."])
    figure.draw_without_rendering()
    title, below = figure.subfigs
    assert [text.get_text() for text in title.texts] == [r"It is $\mathbf{2^{11}}$ \$."]
    (legend,) = below.legends
    boxes = {text.get_text(): text.get_window_extent() for text in legend.get_texts()}
    assert sorted(names, key=lambda name: (-round(boxes[name].y0), boxes[name].x0)) == names
    assert boxes["a"].y1 < title.bbox.y0


@pytest.mark.parametrize("count", [1, 2, 40])
def test_epochs_are_whole_numbers_on_their_axis(count: int) -> None:
    panel = Panel("p", "", "", x=Axis("epoch", (0.6, count + 0.4), whole=True), items=(Line("y", 0.0),))
    (axis,) = matplotlib_painter.paint([[panel]], []).axes
    ticks = [tick for tick in axis.get_xticks() if 0.6 <= tick <= count + 0.4]
    assert ticks
    assert all(tick == round(tick) for tick in ticks)


RUNS = {
    "one step": [make_run("fp32", losses=[6.0], epochs=[])],
    "nothing finite": [make_run("fp32", losses=[nan] * 4), make_run("manual", losses=[inf] * 4, epochs=[inf])],
    "huge": [make_run("fp32", losses=[6.0, 3e38]), make_run("manual", losses=[6.0, 3e38], status="diverged")],
    "no common seed": [make_run("fp32"), make_run("manual", seed=2)],
    "odd scales": [make_run("fp32"), make_run("manual", scales=[inf, 0.0, nan, -1.0])],
    "odd names": [make_run(name) for name in ("$x^{$", "_hidden", "日本\n\x1b[31m", "<b>%s</b>", "\ud800")],
    "20 modes": [make_run(f"mode-{i}") for i in range(20)],
    "ragged": [make_run("fp32", losses=[6.0] * 3), make_run("manual", losses=[6.0], epochs=[])],
    "long": [make_run("a", losses=[5 + i % 7 / 7 for i in range(9000)], scales=[2.0 ** (i % 3) for i in range(9000)])],
}
PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing known": nothing_known,
    "empty": empty,
    "extreme": extreme,
    "one tensor": partial(of_tensors, 1),
    "forty": partial(of_tensors, 40),
    "odd names": lambda: renamed(lambda name: name + "$x^{$ 日本\n\x1b[31m<b>%s</b>"),
}
DRAWN: dict[str, tuple[Callable[[Path], None], Callable[[], list[Panel]]]] = {
    f"{name} (runs)": (
        lambda path, runs=runs: png.write_png(path, make_comparison(runs)),
        lambda runs=runs: panels(make_comparison(runs)),
    )
    for name, runs in RUNS.items()
} | {
    f"{name} (probe)": (
        lambda path, make=make: probe_png.write_png(path, make()),
        lambda make=make: probe_panels(make()),
    )
    for name, make in PROBES.items()
}


@pytest.mark.parametrize("name", DRAWN)
def test_what_is_odd_is_drawn_without_a_warning(tmp_path: Path, name: str) -> None:
    write, make = DRAWN[name]
    write(tmp_path / "odd.png")
    assert [path.name for path in tmp_path.iterdir()] == ["odd.png"]  # nothing left beside it
    image = imread(tmp_path / "odd.png")
    assert image.shape[1] == 1600
    assert image[:, :, :3].min() < 0.2
    for panel in make():
        go.Figure(plotly_painter.paint(panel)).to_json(engine="json")


def pixels(path: Path, comparison: Comparison) -> np.ndarray:
    png.write_png(path / "curves.png", comparison)
    found: np.ndarray = imread(path / "curves.png")[:, :, :3]
    return found


@pytest.mark.slow
def test_every_mode_is_seen_in_its_colour_and_no_letter_is_cut_off(tmp_path: Path) -> None:
    names = ["fp32", "manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16", "amp-fp32", "x" * 60]
    runs = [make_run(name, losses=[6.0 - 0.1 * i, 5.0 + 0.2 * i, 4.5 - i / 5]) for i, name in enumerate(names)]
    probe_png.write_png(tmp_path / "probe.png", sample())
    for count, image in ((8, pixels(tmp_path, make_comparison(runs))), (5, imread(tmp_path / "probe.png")[:, :, :3])):
        for i in range(count):
            assert (np.abs(image - to_rgb(style(i).colour)).max(axis=2) < 0.01).sum() > 500, i
        assert (image[[0, -1]] == 1).all()
        assert (image[:, [0, -1]] == 1).all()


def test_failures_alone_make_a_picture_that_says_so(tmp_path: Path) -> None:
    image = pixels(tmp_path, make_comparison([], [Failure("fp32", 1, ["x"], 1, "error")]))
    assert image.shape[0] == 320
    assert (image.max(axis=2) < 0.01).sum() > 100


def test_equal_results_make_equal_pictures(tmp_path: Path) -> None:
    before = dict(mpl.rcParams)
    for name in ("a", "b"):
        probe_png.write_png(tmp_path / name, of_tensors(1))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert dict(mpl.rcParams) == before


PROGRAM = """
import sys
for name in sys.argv[1].split(","):
    sys.modules[name] = None
from pathlib import Path
from roundoff.errors import UsageError
from roundoff.report import comparison_panels, elements, html, png, probe_html, probe_png, probe_table, summary
from roundoff.report.panels import Line, Panel
for use in (
    lambda: elements.write_page(Path("x"), "", [], [Panel("p", "", "", items=(Line("x", 1),))]),
    lambda: probe_png.write_png(Path("x"), {}),
    lambda: summary.grid([["a"]], {"a": "left"}),
):
    try:
        use()
    except UsageError as error:
        print(error)
"""


def test_a_missing_package_is_one_line_where_it_is_first_needed(tmp_path: Path) -> None:
    """Panels need numpy alone, and so does whatever reads run directories."""
    command = [sys.executable, "-c", PROGRAM, "matplotlib,plotly,tabulate,scipy,torch"]
    done = subprocess.run(command, check=True, timeout=60, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.splitlines() == [
        f"{name} is not installed: pip install 'roundoff[report]'" for name in ("plotly", "matplotlib", "tabulate")
    ]
