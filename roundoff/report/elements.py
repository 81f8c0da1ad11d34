"""The elements of the reports' pages, and the writing of a page.

Nothing that comes from a file is read as markup. Text is escaped, and figures stand in a JSON block that holds no "<".
The page's content security policy fetches nothing, and runs no script but the two that it names by their hashes.
"""

import base64
import hashlib
import re
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from roundoff.errors import printable
from roundoff.extras import needs
from roundoff.report import page, plotly_painter
from roundoff.report.panels import Panel, style
from roundoff.runs.files import write_atomically
from roundoff.runs.json_text import to_json


def text(value: object, limit: int = 1000) -> str:
    """Return `value` as text of the page, one line of at most `limit` characters."""
    return escape(printable(value, limit))


def prose(sentence: object, limit: int = 1000) -> str:
    """Return a sentence as `text` does, with ± for "+-" and raised exponents for "2**7" and "2^7"."""
    raised = re.sub(r"\b(\d+)(?:\*\*|\^)(-?\d+)", r"\1<sup>\2</sup>", text(sentence, limit))
    return raised.replace("+-", "±")


def folded(summary: str, body: Iterable[str]) -> list[str]:
    """Return elements that show themselves after a click on `summary`, which is markup."""
    return [f"<details><summary>{summary}</summary>", *body, "</details>"]


def heads(columns: Iterable[tuple[str, str]]) -> str:
    """Return the row of heads of a table; a column is its head and its alignment."""
    cells = [
        f'<th scope="col" class="{side}">{prose(head.replace("-" + chr(10), "").replace(chr(10), " "))}</th>'
        for head, side in columns
    ]
    return f"<thead><tr>{''.join(cells)}</tr></thead>"


def bullets(sentences: Iterable[str]) -> str:
    """Return a list with a point for each sentence."""
    return f"<ul>{''.join(f'<li>{prose(sentence)}</li>' for sentence in sentences)}</ul>"


def listed(name: str, title: str, sentences: list[str]) -> list[str]:
    """Return a heading with the id `name` and the sentences below it; nothing without sentences."""
    return [f'<h2 id="{name}">{title}</h2>', bullets(sentences)] if sentences else []


def sample(index: int) -> str:
    """Return a piece of line in the style of the mode with the index `index`."""
    look = style(index)
    dash = " ".join(str(length) for length in look.dash) or "none"
    return (
        f'<svg class="sample" viewBox="0 0 34 10" aria-hidden="true"><line x1="0" y1="5" x2="34" y2="5" '
        f'stroke="{look.colour}" stroke-width="3" stroke-dasharray="{dash}"/></svg>'
    )


def switches(modes: Iterable[tuple[int, str]]) -> str:
    """Return the buttons that switch modes on and off. A mode is its index and its label."""
    buttons = [
        f'<button type="button" data-mode="{index}" aria-pressed="true">{sample(index)}{text(label, 60)}</button>'
        for index, label in modes
    ]
    return f'<nav aria-label="modes">{"".join(buttons)}</nav>'


def place_of(panel: Panel) -> str:
    """Return title and caption of `panel`, and the element that it is drawn in."""
    height = plotly_painter.height(panel)
    size = f' style="height: {height}px"' if height else ""
    name = text(panel.title)
    chart = (
        f'<div class="chart" id="{panel.id}" role="figure" aria-label="{name}" aria-describedby="{panel.id}-caption"'
    )
    drawn = f"{chart}{size}></div>" if panel.items else ""
    return f'<h3>{name}</h3>\n<p class="caption" id="{panel.id}-caption">{prose(panel.caption)}</p>\n{drawn}'


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Return the fields of nested objects under one name, such as "corpus sha256 train".

    A command becomes the line that a shell would take.
    """
    found: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} ")
        elif name == "command" and isinstance(value, list):
            found[prefix + name] = shlex.join(str(word) for word in value)
        else:
            found[prefix + name] = value if isinstance(value, str) else to_json(value)
    return found


def write_page(path: Path, title: str, body: Sequence[str], panels: Sequence[Panel]) -> None:
    """Write the page, about 5 MB of which are Plotly's script where it has figures.

    Args:
        path: of the file.
        title: of the page, plain text.
        body: its elements.
        panels: those whose places are in the body.

    Raises:
        OSError: `path` cannot be written.
        UsageError: plotly is not installed.
    """
    figures, programs = _drawn(panels) if panels else ("", [])
    scripts = [f'<script type="application/json" id="charts">[{figures}]</script>']
    scripts += [f"<script>{program}</script>" for program in programs]
    content = page.FRAME.format(
        title=text(title),
        style=page.STYLE,
        hashes=" ".join(_hash(program) for program in programs) or "'none'",
        body="\n".join(body),
        scripts="\n".join(scripts),
    )
    # A path that is not UTF-8 has lone surrogates, which no encoding of a page can hold.
    write_atomically(path, lambda file: file.write(content.encode("utf-8", "replace")))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _drawn(panels: Iterable[Panel]) -> tuple[str, list[str]]:
    """Return the figures as JSON, and the scripts that draw them.

    Plotly writes inf and nan as null or as bytes of an array, and "<" as an escape. Its `Figure` refuses misspelt
    properties.
    """
    with needs("report"):
        import plotly.graph_objects as go  # type: ignore[import-untyped]
        from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]
    entries = [
        f'{{"id":"{panel.id}","over_steps":{str(panel.over_steps).lower()},'
        f'"figure":{go.Figure(plotly_painter.paint(panel)).to_json(engine="json")}}}'
        for panel in panels
        if panel.items
    ]
    return ",\n".join(entries), [get_plotlyjs(), page.SCRIPT]
