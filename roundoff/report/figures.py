"""The interactive figures of report.html, built with Plotly."""

from typing import Any

import numpy as np

from roundoff.report import curves, traces
from roundoff.report.curves import Floats, Mode
from roundoff.report.elements import Chart
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison

_EXACT = "%{y:.5g} (this step exactly %{customdata:.9g})"  # 9 digits tell every fp32 number from its neighbours


def charts(comparison: Comparison) -> list[Chart]:
    """All figures; none where no run has a step."""
    drawn = curves.modes(comparison)
    if not drawn:
        return []
    reference = next((mode for mode in drawn if mode.label == comparison.reference), None)
    window = curves.window(drawn)
    return [
        _loss(drawn, reference, window),
        _difference(drawn, reference, window),
        _size(drawn, reference, window),
        _validation(drawn),
        _loss_scale(drawn),
        _grad_norm(drawn, window),
    ]


def _loss(drawn: list[Mode], reference: Mode | None, window: int) -> Chart:
    figure = traces.empty(drawn, "training loss, nats a word")
    caption = f"{_smoothing(window)}{_seeds(drawn)}"
    band = reference and curves.band(reference, window)
    if reference and band:
        traces.add_band(figure, reference, band)
        caption += f" Grey band: least to greatest smoothed loss of the {len(reference.runs)} seeds of the reference."
    shown = _add_raws(figure, drawn, window, "loss")
    for mode, run, first in curves.layers(drawn):
        loss = curves.column(run, "loss")
        smoothed = curves.smooth(loss, window)
        shown.append((run, smoothed))
        traces.add_line(figure, mode, curves.steps(run), smoothed, first, exact=loss, hover=_EXACT)
    figure.update_yaxes(range=curves.limits(shown))
    return Chart("loss", "Training loss", caption, figure)


def _difference(drawn: list[Mode], reference: Mode | None, window: int) -> Chart:
    title = "Difference to the reference"
    if reference is None:
        return Chart("difference", title, "The reference has no step to compare with.", None)
    figure = traces.empty(drawn, "difference in training loss, nats")
    caption = (
        f"Training loss minus that of the reference ({reference.label}) on the same batch, with the same seed; below "
        f"zero is better. {_smoothing(window, raw=False)}{_seeds(drawn)}"
    )
    band = curves.noise(reference, window)
    if band:
        traces.add_band(figure, reference, band)
        caption += " Grey band: how far the reference's own seeds lie from their mean."
    shown = []
    for mode, run, first in curves.layers(drawn):
        found = None if mode is reference else curves.difference(run, reference)
        if found is None:
            continue
        smoothed = curves.smooth(found[1], window)
        shown.append((run, smoothed))
        traces.add_line(figure, mode, found[0], smoothed, first, exact=found[1], hover=_EXACT)
    if not shown:
        return Chart("difference", title, "No other mode has a step and a seed in common with the reference.", None)
    limit = curves.reach(shown, band)
    figure.update_yaxes(range=[-limit, limit], zeroline=True, zerolinecolor="#000000", zerolinewidth=1.5)
    return Chart("difference", title, caption, figure)


def _size(drawn: list[Mode], reference: Mode | None, window: int) -> Chart:
    title = "Size of the difference"
    figure = traces.empty(drawn, "size of the difference, nats")
    figure.update_yaxes(type="log", exponentformat="power")
    shown = []
    for mode, run, first in curves.layers(drawn):
        found = reference and mode is not reference and curves.difference(run, reference)
        if found:
            size = np.abs(found[1])
            smoothed = curves.positive(curves.smooth(size, window))
            shown.append((run, np.log10(smoothed)))
            traces.add_line(figure, mode, found[0], smoothed, first, exact=size, hover=_EXACT)
    span = curves.limits(shown)
    if span is None:
        return Chart("size", title, "No step differs from the reference's with the same seed.", None)
    figure.update_yaxes(range=span, dtick=1 if span[1] - span[0] > 1.5 else None)  # powers of ten, if there are some
    caption = (
        f"The same without its sign, on a logarithmic axis: where rounding first tells, and how it grows. "
        f"{_smoothing(window, raw=False)} Where nothing differs there is no line."
    )
    return Chart("size", title, caption, figure)


def _validation(drawn: list[Mode]) -> Chart:
    title = "Validation perplexity"
    last = curves.last_epoch(drawn)
    if not last:
        return Chart("validation", title, "No run has completed an epoch.", None)
    figure = traces.empty([], title.lower())
    shown = []
    for mode, run, first in curves.layers(drawn):
        if not run.epochs:
            continue
        x, perplexity = curves.epochs(run, drawn)
        shown.append((run, perplexity))
        traces.add_line(figure, mode, x, perplexity, first, exact=x.round(), hover="epoch %{customdata}: %{y:.6g}")
    figure.update_traces(mode="lines+markers")
    figure.update_yaxes(range=curves.limits(shown))
    figure.update_xaxes(title="epoch", range=[0.6, last + 0.4], dtick=1 if last <= 20 else None)
    figure.update_layout(hovermode="closest")
    caption = "At the end of each epoch; modes may stand side by side so as not to hide each other."
    return Chart("validation", title, caption + _seeds(drawn), figure, over_steps=False)


def _loss_scale(drawn: list[Mode]) -> Chart:
    title = "Loss scale and skipped steps"
    figure = traces.empty(drawn, "loss scale")
    shown = []
    for mode, run, first in curves.layers(drawn):
        at, scales, skipped = curves.loss_scale(run)
        shown.append(np.log2(scales[np.isfinite(scales)]))
        traces.add_line(figure, mode, at, scales, first, hover="%{y:g}", markers=False, shape="hv")
        if len(skipped):
            traces.add_crosses(figure, mode, at[skipped], scales[skipped], first)
    powers = np.concatenate(shown)
    if not len(powers):
        return Chart("scale", title, "No run has a loss scale that could be drawn.", None)
    low, high = int(np.floor(powers.min())), int(np.ceil(powers.max()))
    ticks = range(low, high + 1, max(1, (high - low) // 8))
    figure.update_yaxes(
        type="log",
        range=[float(np.log10(2.0) * power) for power in (low - 1, high + 1)],
        tickvals=[2.0**power for power in ticks],
        ticktext=[f"2<sup>{power}</sup>" for power in ticks],
    )
    caption = (
        "The factor that each step's loss was multiplied by, on a logarithmic axis of base 2; crosses: steps skipped "
        "because a gradient was inf or nan." + _seeds(drawn)
    )
    return Chart("scale", title, caption, figure)


def _grad_norm(drawn: list[Mode], window: int) -> Chart:
    figure = traces.empty(drawn, "gradient norm")
    figure.update_yaxes(type="log", exponentformat="power")
    shown = [(run, np.log10(norms)) for run, norms in _add_raws(figure, drawn, window, "grad_norm")]
    for mode, run, first in curves.layers(drawn):
        norm = curves.positive(curves.column(run, "grad_norm"))
        smoothed = np.exp(curves.smooth(np.log(norm), window))
        shown.append((run, np.log10(smoothed)))
        traces.add_line(figure, mode, curves.steps(run), smoothed, first, exact=norm, hover=_EXACT)
    span = curves.limits(shown)
    if span is None:
        return Chart("norm", "Gradient norm", "No run has a finite gradient norm above zero.", None)
    figure.update_yaxes(range=span)
    caption = (
        f"L2 norm of the unscaled gradients before clipping, on a logarithmic axis. {_smoothing(window, 'geometric ')}"
        " Steps whose norm is zero, inf or nan leave a gap." + _seeds(drawn)
    )
    return Chart("norm", "Gradient norm", caption, figure)


def _add_raws(figure: Any, drawn: list[Mode], window: int, name: str) -> list[tuple[Run, Floats]]:
    """Add the single steps of each mode's first run; return the range of all but the rarest, for the y axis."""
    shown = []
    for mode in drawn if window > 1 else []:
        run = mode.runs[0]
        values = curves.column(run, name)
        values = curves.positive(values) if name == "grad_norm" else values
        traces.add_raw(figure, mode, curves.steps(run), values)
        if np.isfinite(values).any():
            shown.append((run, np.quantile(values[np.isfinite(values)], [0.002, 0.998])))
    return shown


def _smoothing(window: int, kind: str = "", raw: bool = True) -> str:
    if window == 1:
        return "Every step as it is."
    pale = (
        f" Pale: single steps; of a run of more than {curves.POINTS}, the least and the greatest of each stretch."
        if raw
        else ""
    )
    return f"Lines: {kind}mean of {window} steps around each.{pale}"


def _seeds(drawn: list[Mode]) -> str:
    if all(len(mode.runs) == 1 for mode in drawn):
        return ""
    return " Strong: the first seed, which also answers the pointer; thin: the other seeds."
