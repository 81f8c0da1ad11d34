"""The panels of a probe: a row for each tensor, in the order of the forward pass.

The tensors stand at 0, 1, 2 and so on from above; "all parameters" stands at -1.
"""

from collections.abc import Mapping

import numpy as np

from roundoff.errors import printable
from roundoff.report import probe_view as view
from roundoff.report.panels import Axis, Floats, HeatMap, Item, Line, Marks, Panel, Stretch, Tick
from roundoff.report.probe_view import Result

SPREAD = 0.7
"""Share of a row over which the modes stand one below the other."""

FIGURES = {
    "error_to_noise": (
        "Error to noise",
        "Root mean square of the error of the unscaled gradient against float64, over the standard deviation of "
        "the float64 gradient from batch to batch; 0.001 adds a millionth to the variance that sampling has. "
        "Bars: twice the standard error, from the number of batches.",
    ),
    "bias": (
        "Bias",
        "Length of the mean error, over the length of the mean gradient: what does not average out. "
        "Bars: its square plus and minus twice the square's standard error; where one reaches down to the axis, "
        "the bias may be 0. A bias that was found to be 0 has no mark.",
    ),
}
"""Figure -> its title and its caption."""


def panels(
    result: Result, prefix: str = "", places: Mapping[str, int] | None = None, aligned: bool = False
) -> list[Panel]:
    """Return all panels.

    Args:
        result: of the probe.
        prefix: of the ids, where a page shows several probes.
        places: mode -> its index in the page, which gives it its style; by default in the order of the probe.
        aligned: every tensor has a row in every panel, also where nothing is known of it.
    """
    known = {name: i for i, name in enumerate(view.modes(result))} if places is None else places
    return [
        _errors(result, f"{prefix}error", known, "error_to_noise", aligned),
        _errors(result, f"{prefix}bias", known, "bias", aligned),
        _heat(result, f"{prefix}heat"),
    ]


def _rows(names: list[Tick]) -> Axis:
    return Axis("", (names[-1].at + 0.5, names[0].at - 0.5), ticks=tuple(names))


def _labels(result: Result) -> list[str]:
    return [view.short(printable(name)) for name in view.tensors(result)]


def _errors(result: Result, name: str, places: Mapping[str, int], figure: str, aligned: bool) -> Panel:
    """Return the panel of `figure` and its error, of each mode in each tensor and over all parameters."""
    title, caption = FIGURES[figure]
    values = {mode: view.column(result, mode, figure) for mode in view.modes(result)}
    positive = np.array([values[mode] for mode in values]) > 0
    if not positive.any():
        return Panel(name, title, f"No mode has a known {title.lower()} above 0.")
    labels = [view.TOTAL, *_labels(result)]
    rows = [i for i in range(len(labels)) if i == 0 or aligned or positive[:, i].any()]
    ticks = [Tick(at - 1, labels[row], bold=row == 0) for at, row in enumerate(rows)]
    seen = np.concatenate([value[value > 0] for value in values.values()])
    low, high = float(np.floor(np.log10(seen.min()))), float(np.ceil(np.log10(seen.max())))
    x = Axis(title.lower(), (10 ** (low - 0.1), 10 ** (max(high, low + 1) + 0.1)), log=True)
    # Without stripes the eye loses its row.
    items: list[Item] = [Stretch("y", at - 1.5, at - 0.5, "#f6f6f4") for at in range(0, len(rows), 2)]
    texts = [printable(text, 80) for text in (view.TOTAL, *view.tensors(result))]
    for turn, mode in enumerate(values):
        at = np.arange(len(rows), dtype=np.float64) - 1 + SPREAD * ((turn + 0.5) / len(values) - 0.5)
        errors = np.nan_to_num(view.column(result, mode, f"{figure}_error"))[rows]
        there = values[mode][rows] > 0
        items.append(
            Marks(
                places[mode],
                mode,
                values[mode][rows][there],
                at[there],
                hover="{text}: {x:.3g} ± {exact:.1g}",
                texts=tuple(texts[row] for row, kept in zip(rows, there, strict=True) if kept),
                exact=errors[there],
                bars=_bars(figure, values[mode][rows][there], errors[there]),
            )
        )
    if figure == "error_to_noise":
        items.append(Line("x", 1.0, "#888888", 1, dotted=True))
    return Panel(name, title, caption, title, x, _rows(ticks), tuple(items), rows=len(rows))


def _bars(figure: str, x: Floats, errors: Floats) -> tuple[Floats, Floats]:
    """Return lengths down and up: twice the standard error, for a bias that of its square (see `statistics.bias`)."""
    down = up = 2 * errors
    if figure == "bias":
        two = 2 * ((x + errors) ** 2 - x**2)
        down, up = x - np.sqrt(np.maximum(x**2 - two, 0.0)), np.sqrt(x**2 + two) - x
    return np.minimum(down, x * (1 - 1e-6)), up  # a logarithmic axis has no place for a bar that ends at 0


def _heat(result: Result, name: str) -> Panel:
    """Return the shares that each static scale would flush or let overflow, with the safe window drawn in."""
    ks, labels, scaling = result["scales"]["k"], _labels(result), view.scaling(result)
    shares = [view.predicted(result, what) for what in ("flushed", "subnormal", "overflowed")]
    caption = (
        "Predicted from the float64 gradients, for fp16 and every static loss scale: blue, the share of each tensor "
        "that becomes 0; orange, the share that overflows, of which any costs the step. "
    )
    headline = "Lost in fp16 (predicted)"
    items: list[Item] = [
        HeatMap(
            tuple(ks),
            view.heat(result),
            view.COLOURS,
            view.SHADES,
            "{text} at 2^{x}: flushed {exact[0]:.3%}, subnormal {exact[1]:.3%}, overflowed {exact[2]:.3%}",
            tuple(printable(tensor, 80) for tensor in view.tensors(result)),
            np.stack(shares, axis=-1),
        )
    ]
    window = result["window"]
    if window is None:
        caption += "No scale that was looked at serves every tensor."
    else:
        items.append(Stretch("x", window["low"] - 0.5, window["high"] + 0.5))
        caption += f"Frame: the safe window, from 2**{window['low']} to 2**{window['high']}."
        headline += "; frame: safe"
    if result["scale"] is not None:
        items.append(Line("x", result["scale"], dotted=True))
        caption += f" Dotted: the scale to take, 2**{result['scale']}."
        headline += "; dots: to take"
    if scaling:
        texts = tuple(printable(", ".join(modes), 200) for modes in scaling.values())
        at = np.array(list(scaling))
        hover = "scale of {text}"
        items.append(Marks(None, "", at, np.full(len(at), -0.5), "triangle", hover=hover, texts=texts))
        caption += " Triangles above: the scales of " + "; ".join(
            f"{', '.join(printable(mode, 60) for mode in modes)} (2**{k:g})" for k, modes in sorted(scaling.items())
        )
        caption += "."
        headline += "; triangles: of the modes"
    x = Axis(
        "loss scale",
        (ks[0] - 0.5, ks[-1] + 0.5),
        ticks=tuple(Tick(k, "2", str(k)) for k in ks[:: max(1, len(ks) // 8)]),
    )
    y = _rows([Tick(i, label) for i, label in enumerate(labels)])
    return Panel(name, "Every loss scale", caption, headline, x, y, tuple(items), rows=len(labels))
