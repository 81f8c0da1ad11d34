"""report.html: a comparison as one page that needs no network."""

from pathlib import Path
from typing import Any

from roundoff.errors import printable
from roundoff.report import curves
from roundoff.report.comparison_panels import JUDGED, VERDICTS, panels
from roundoff.report.elements import (
    bullets,
    flat,
    folded,
    heads,
    listed,
    place_of,
    prose,
    sample,
    switches,
    text,
    write_page,
)
from roundoff.report.panels import Panel
from roundoff.report.probe_html import section
from roundoff.report.said import said
from roundoff.report.summary import VERDICT_COLUMNS, columns, legend, problems, row, unfinished
from roundoff.runs.reading import Run, has_perplexity
from roundoff.verdict.types import LONGEST_UNIT, Comparison, ModeSummary


def write_html(path: Path, comparison: Comparison) -> None:
    """Write the report, about 5 MB of which are Plotly's script.

    Raises:
        OSError: `path` cannot be written.
        UsageError: plotly is not installed.
    """
    drawn = panels(comparison)
    probed, of_probes = _probes(comparison)
    verdicts = [panel for panel in drawn if panel.id == VERDICTS]
    others = [panel for panel in drawn if panel.id != VERDICTS]
    body = [
        *_introduction(comparison),
        *_verdicts(comparison),
        *(place_of(panel) for panel in verdicts),
        *_details(comparison),
        "<h2>What was compared</h2>",
        f"<p>{text(_subject(comparison, _runs(comparison)), 3000)}</p>",
        *_figures(comparison, others),
        *probed,
        "<h2>What the intervals cover</h2>",
        bullets(comparison.covers),
        *listed("failures", "Runs that failed or did not finish", list(unfinished(comparison.modes))),
        *listed("problems", "Noted in the files", list(problems(comparison.modes))),
        *_origins(comparison),
    ]
    write_page(path, _title(comparison), body, [*drawn, *of_probes])


def _title(comparison: Comparison) -> str:
    labels = [mode.label for mode in comparison.modes]
    return f"{labels[0]} beside {', '.join(labels[1:])}" if len(labels) > 1 else labels[0]


def _introduction(comparison: Comparison) -> list[str]:
    body = ["<h1>Precision modes compared</h1>", *(f'<p class="said">{prose(s)}</p>' for s in said(comparison))]
    if comparison.differences:
        head = "What these runs do not have in common" if comparison.accepted else "Differences that the names mean"
        body.append(f'<div class="notice"><strong>{head}</strong>')
        body.append(f"{bullets(comparison.differences)}</div>")
    found = {
        "failures": len(list(unfinished(comparison.modes))),
        "problems": len(list(problems(comparison.modes))),
    }
    names = {"failures": "Runs that failed or did not finish", "problems": "Notes on the files"}
    links = [f'<a href="#{name}">{names[name]}: {count}</a>' for name, count in found.items() if count]
    return body + ([f'<p class="notice">{" · ".join(links)}</p>'] if links else [])


def _subject(comparison: Comparison, runs: list[Run]) -> str:
    """Return the sentences on what was compared."""
    labels = ", ".join(mode.label for mode in comparison.modes)
    if not runs:
        return f"{labels}: no run left anything to compare."
    seeds = ", ".join(str(seed) for seed in sorted({run.seed for run in runs}))
    devices = ", ".join(dict.fromkeys(run.device for run in runs))
    unit = f"losses are in {printable(comparison.unit, LONGEST_UNIT)}; " if comparison.unit else ""
    margin = f"{comparison.margin:g} {comparison.short_unit}".rstrip()
    job = f"{'training jobs that differ, the first' if comparison.differences else 'one training job'}{_job(runs[0])}"
    return (
        f"{labels}: {len(runs)} run(s) of {job}, seed(s) {seeds}, on {devices}. "
        f"The reference is {comparison.reference}; {unit}modes whose mean training losses over the "
        f"second half of the steps surely differ by less than {margin} are equivalent."
    )


def _job(run: Run) -> str:
    """Return the plain values of the run's job in brackets; nothing without any."""
    plain = [f"{printable(name, 30)} {printable(value, 60)}" for name, value in run.job.items() if _is_plain(value)]
    return f" ({', '.join(plain)})" if plain else ""


def _is_plain(value: object) -> bool:
    return isinstance(value, str | int | float)


def _verdicts(comparison: Comparison) -> list[str]:
    """Return the table of the verdicts, and the sentences on them, folded."""
    return [
        "<h2>Verdicts</h2>",
        _table(comparison, list(columns(comparison))[1:VERDICT_COLUMNS]),
        *folded("Each verdict with its figures", [bullets(mode.verdict.sentence for mode in comparison.modes)]),
    ]


def _details(comparison: Comparison) -> list[str]:
    """Return the other columns of the table, folded, and the bit-equality of the modes."""
    further = [
        _table(comparison, list(columns(comparison))[VERDICT_COLUMNS:]),
        f'<p class="caption">{prose(" ".join(legend(comparison)), 2000)}</p>',
    ]
    equal = [pair.sentence for pair in comparison.pairs]
    return [
        *folded("Losses, steps, speed and memory of each mode", further),
        *listed("equality", "Bit-equality of the training losses", equal),
    ]


def _table(comparison: Comparison, chosen: list[str]) -> str:
    """Return the table of the modes with the columns `chosen`."""
    sides = columns(comparison)
    rows = [_row(place, mode, comparison, chosen) for place, mode in enumerate(comparison.modes)]
    return (
        f'<div class="wide"><table class="results">{heads([("mode", "left"), *((n, sides[n]) for n in chosen)])}'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _row(place: int, mode: ModeSummary, comparison: Comparison, chosen: list[str]) -> str:
    about = f"{len(mode.runs)} seeds, {mode.status}" if len(mode.runs) > 1 else mode.status
    cells = [f'<th scope="row" class="mode">{sample(place)}{text(mode.label)}<small>{text(about)}</small></th>']
    sides = columns(comparison)
    for head, cell in zip(sides, row(mode, comparison), strict=True):
        if head in chosen:
            kind = f" verdict {cell}" if head == "verdict" and cell in JUDGED else ""
            cells.append(f'<td class="{sides[head]}{kind}">{text(cell).replace(" [", "<small>[")}</td>')
    return f"<tr>{''.join(cells)}</tr>"


def _figures(comparison: Comparison, drawn: list[Panel]) -> list[str]:
    if not drawn:
        return ["<h2>Curves</h2>", "<p>No run has a step that could be drawn.</p>"]
    return [
        "<h2>Curves</h2>",
        '<p class="caption">A step stands at its position in the data: at one step, every mode has seen the same '
        "batches, also after skipped steps, when it has applied fewer updates. Dotted lines: ends of epochs. "
        "Drag to zoom, in all figures over steps at once; double click to return. The buttons switch modes on and off "
        "in all figures; a double click on one shows it alone.</p>",
        "<noscript><p>The figures need JavaScript; curves.png shows the main ones without.</p></noscript>",
        switches((mode.index, mode.label) for mode in curves.modes(comparison)),
        *(place_of(panel) for panel in drawn),
    ]


def _probes(comparison: Comparison) -> tuple[list[str], list[Panel]]:
    """Return elements and panels of the probes. A mode looks in them as it does above."""
    body, drawn = list[str](), list[Panel]()
    places = {mode.label: i for i, mode in enumerate(comparison.modes)}
    for i, probe in enumerate(comparison.probes):
        if probe.result is None:
            body += [f"<h2>{text(probe.title)}</h2>", f"<p>{text(f'It failed: {probe.problem}')}</p>"]
        else:
            elements, of_probe = section(probe.result, probe.title, f"probe-{i}-", places)
            body += elements
            drawn += of_probe
    return body, drawn


def _runs(comparison: Comparison) -> list[Run]:
    return [run for mode in comparison.modes for run in mode.runs]


def _origins(comparison: Comparison) -> list[str]:
    runs = _runs(comparison)
    tables = [flat({**run.config, "result": _result_of(run)}) for run in runs]
    names = {name for table in tables for name in table}
    differing = {name for name in names if len({table.get(name) for table in tables}) > 1}
    body = [_origin(run, table, differing) for run, table in zip(runs, tables, strict=True)]
    if not body:
        return []
    note = "<p>Marked: what is not the same in all of these runs.</p>" if differing else ""
    return folded("<h2>How each run was made</h2>", [note, *body])


def _result_of(run: Run) -> dict[str, Any]:
    """Return `result.json`, without a perplexity where exp of a loss is none."""
    left_out = () if has_perplexity(run.loss_unit) else ("test_ppl",)
    return {name: value for name, value in (run.result or {}).items() if name not in left_out}


def _origin(run: Run, table: dict[str, str], differing: set[str]) -> str:
    marks = {name: " class=differs" if name in differing else "" for name in table}
    rows = [
        f'<tr{marks[name]}><th scope="row">{text(name)}</th><td>{text(value)}</td></tr>'
        for name, value in table.items()
    ]
    summary = f"<strong>{text(run.label)}</strong>, seed {run.seed}, {text(run.status)}: <code>{text(run.path)}</code>"
    return (
        f"<details><summary>{summary}</summary>"
        f'<div class="wide"><table><tbody>{"".join(rows)}</tbody></table></div></details>'
    )
