"""probe.html: a probe as one page that needs no network."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from roundoff.gradients.advice import said
from roundoff.report import probe_view as view
from roundoff.report.elements import bullets, flat, folded, heads, place_of, prose, sample, switches, text, write_page
from roundoff.report.panels import Panel
from roundoff.report.probe_panels import panels
from roundoff.report.probe_table import (
    BOTH,
    COLUMNS,
    FORWARD,
    FORWARD_LEGEND,
    LEGEND,
    ROWS,
    about,
    forward,
    noise,
    row,
    side_by_side,
)
from roundoff.report.probe_view import Result
from roundoff.report.summary import memory

TITLE = "What each precision mode does to the gradient"


def write_html(path: Path, result: Result) -> None:
    """Write the page of `result`, which is what `roundoff.gradients.result.read_probe` returns.

    Raises:
        OSError: `path` cannot be written.
        UsageError: plotly is not installed.
    """
    drawn = panels(result)
    modes = view.modes(result)
    body = [
        f"<h1>{TITLE}</h1>",
        f'<p class="said">{prose(said(result))}</p>',
        *advice(result, "h2"),
        f"<p>{text(about(result))} {prose(noise(result))}</p>",
        "<h2>Results</h2>",
        *table(result, {mode: i for i, mode in enumerate(modes)}),
        "<h3>Forward pass and critical batch</h3>",
        _table(FORWARD, [f"<tr>{_name(text(mode))}{_cells(cells)}</tr>" for mode, *cells in forward(result)]),
        f'<p class="caption">{text(FORWARD_LEGEND, 400)}</p>',
        "<h2>Figures</h2>",
        '<p class="caption">Tensors stand in the order of the forward pass. The buttons switch modes on and off; a '
        "double click on one shows it alone. Drag to zoom, double click to return.</p>",
        "<noscript><p>The figures need JavaScript; probe.png shows the main ones without.</p></noscript>",
        switches(enumerate(modes)),
        *(place_of(panel) for panel in drawn),
        *_measured(result),
        "<h2>What the figures do not cover</h2>",
        bullets(result["covers"]),
        "<h2>Every tensor</h2>",
        *(_tensors(result, mode) for mode in modes),
        *_origin(result),
    ]
    write_page(path, TITLE, body, drawn)


def section(result: Result, title: str, prefix: str, places: Mapping[str, int]) -> tuple[list[str], list[Panel]]:
    """Return the probe as part of another page: its elements, and the panels whose places are in them.

    Args:
        result: of the probe.
        title: plain text.
        prefix: of the panels' ids.
        places: mode -> its index in the page.
    """
    drawn = panels(result, prefix, places)
    body = [
        f"<h2>{text(title)}</h2>",
        f'<p class="said">{prose(said(result))}</p>',
        *advice(result, "h3"),
        f"<p>{text(about(result))} {prose(noise(result))}</p>",
        *table(result, places),
        *(place_of(panel) for panel in drawn),
        "<h3>What these figures do not cover</h3>",
        bullets(result["covers"]),
    ]
    return body, drawn


def advice(result: Result, heading: str) -> list[str]:
    """Return the advice below a heading of that kind; nothing without any."""
    sentences: Sequence[str] = result["advice"]
    return [f"<{heading}>Advice</{heading}>", bullets(sentences)] if sentences else []


def table(result: Result, places: Mapping[str, int]) -> list[str]:
    """Return the table, with a row for each mode and one for its worst tensor, and the meaning of the columns."""
    rows = []
    for mode in view.modes(result):
        found = result["modes"][mode]
        note = f"loss scale {found['loss_scale']:g}, {found['weights']} weights, {found['dtype']} gradients"
        name = f'<th scope="row" class="mode">{sample(places[mode])}{text(mode)}<small>{text(note)}</small></th>'
        worst = view.worst(result, mode)
        rows.append(f"<tr{' class=first' if worst else ''}>{name}{_cells(row(result, mode))}</tr>")
        if worst is not None:
            name = _name(f"worst: {text(view.short(worst, 60))}")
            rows.append(f"<tr class=worst>{name}{_cells(row(result, mode, worst))}</tr>")
    return [
        _table(COLUMNS, rows),
        f'<p class="caption">{prose(" ".join([ROWS, *LEGEND]), 2000)}</p>',
    ]


def _name(shown: str) -> str:
    return f'<th scope="row">{shown}</th>'


def _cells(shown: Sequence[str]) -> str:
    return "".join(f'<td class="right">{prose(cell)}</td>' for cell in shown)


def _table(columns: Mapping[str, str], rows: Sequence[str]) -> str:
    return (
        f'<div class="wide"><table class="results">{heads(columns.items())}<tbody>{"".join(rows)}</tbody></table></div>'
    )


def _measured(result: Result) -> list[str]:
    body: list[str] = []
    for what, title in BOTH.items():
        columns, rows = side_by_side(result, what)
        if rows:
            cells = [f"<tr>{_name(text(tensor))}{_cells(shares)}</tr>" for tensor, *shares in rows]
            body += [f"<h3>{title}</h3>", _table(columns, cells)]
    note = (
        '<p class="caption">Predicted: each tensor alone, from its float64 gradients. Measured: through the mode, '
        "where what was lost on the way back is missing too.</p>"
    )
    return [*body, note] if body else []


def _tensors(result: Result, mode: str) -> str:
    rows = [f"<tr>{_name(text(name))}{_cells(row(result, mode, name))}</tr>" for name in view.tensors(result)]
    return (
        f"<details><summary><strong>{text(mode)}</strong></summary>"
        f"{_table({'tensor': 'left'} | dict(list(COLUMNS.items())[1:]), rows)}</details>"
    )


def _origin(result: Result) -> list[str]:
    left_out = ("tensors", "total", "modes", "scales", "window", "scale", "about", "advice", "covers")
    fields = {name: value for name, value in result.items() if name not in left_out}
    fields |= {"seconds": f"{result['seconds']:.1f}", "peak_memory_bytes": memory(result["peak_memory_bytes"])}
    rows = "".join(f"<tr>{_name(text(name))}<td>{text(value)}</td></tr>" for name, value in flat(fields).items())
    table = f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'
    return folded("<h2>How this was made</h2>", [table])
