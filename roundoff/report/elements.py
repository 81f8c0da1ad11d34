"""What the pages of the reports are made of, and how one is written.

Nothing that comes from a file is read as markup: it is escaped in the text, figures stand in a JSON block that holds no
"<", and the page's content security policy runs no script but the two that are named by their hashes, and fetches
nothing.
"""

import base64
import hashlib
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from plotly.offline import get_plotlyjs  # type: ignore[import-untyped]

from roundoff.errors import printable
from roundoff.report import curves, page
from roundoff.runs.files import write_atomically
from roundoff.runs.jsonfile import to_json


@dataclass(frozen=True)
class Chart:
    """A figure of a page. Each trace's `meta` is the index of its mode, by which the page switches it on and off.

    A trace without one is of no mode, and always there.

    Attributes:
        id: of its element in the page.
        title, caption: plain text.
        figure: None where there is nothing to draw in it; the caption then says so.
        over_steps: its x axis is the step, and follows the zoom of the others.
    """

    id: str
    title: str
    caption: str
    figure: Any
    over_steps: bool = True


def text(value: object, limit: int = 1000) -> str:
    """`value` as text of the page, one line of at most `limit` characters."""
    return escape(printable(value, limit))


def bullets(sentences: Iterable[str]) -> str:
    """A list with a point for each sentence."""
    return f"<ul>{''.join(f'<li>{text(sentence)}</li>' for sentence in sentences)}</ul>"


def listed(name: str, title: str, sentences: list[str]) -> list[str]:
    """A heading with the id `name` and the sentences below it; nothing without sentences."""
    return [f'<h2 id="{name}">{title}</h2>', bullets(sentences)] if sentences else []


def sample(index: int) -> str:
    """A piece of line in the style of the mode at `index`."""
    style = curves.style(index)
    dash = " ".join(str(length) for length in style.dash) or "none"
    return (
        f'<svg class="sample" viewBox="0 0 34 10" aria-hidden="true"><line x1="0" y1="5" x2="34" y2="5" '
        f'stroke="{style.colour}" stroke-width="3" stroke-dasharray="{dash}"/></svg>'
    )


def switches(modes: Iterable[tuple[int, str]]) -> str:
    """The buttons that switch modes on and off, of each its index and its label."""
    buttons = [
        f'<button type="button" data-mode="{index}" aria-pressed="true">{sample(index)}{text(label, 60)}</button>'
        for index, label in modes
    ]
    return f'<nav aria-label="modes">{"".join(buttons)}</nav>'


def place_of(chart: Chart) -> str:
    """Title and caption of `chart`, and the element that it is drawn in."""
    height = chart.figure and chart.figure.layout.height
    style = f' style="height: {height:.0f}px"' if height else ""
    drawn = "" if chart.figure is None else f'<div class="chart" id="{chart.id}"{style}></div>'
    return f'<h3>{chart.title}</h3>\n<p class="caption">{text(chart.caption)}</p>\n{drawn}'


def flat(content: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Fields of nested objects under one name, such as "corpus sha256 train"; a command as a shell would take it."""
    found: dict[str, str] = {}
    for name, value in content.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name} ")
        elif name == "command" and isinstance(value, list):
            found[prefix + name] = shlex.join(str(word) for word in value)
        else:
            found[prefix + name] = value if isinstance(value, str) else to_json(value)
    return found


def write_page(path: Path, title: str, body: Sequence[str], drawn: Sequence[Chart]) -> None:
    """Write the page, about 5 MB of which are Plotly's script where it has figures.

    Args:
        path: of the file.
        title: of the page, plain text.
        body: its elements.
        drawn: the charts whose places are in the body.

    Raises:
        OSError: `path` cannot be written.
    """
    scripts = [get_plotlyjs(), page.SCRIPT] if drawn else []
    content = page.FRAME.format(
        title=text(title),
        style=page.STYLE,
        hashes=" ".join(_hash(script) for script in scripts) or "'none'",
        body="\n".join(body),
        scripts="\n".join([_data(drawn), *(f"<script>{script}</script>" for script in scripts)]),
    )
    # A path that is not UTF-8 has lone surrogates, which no encoding of a page can hold.
    write_atomically(path, lambda file: file.write(content.encode("utf-8", "replace")))


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _data(drawn: Iterable[Chart]) -> str:
    """The figures as JSON. Plotly writes inf and nan as null or as bytes of an array, and "<" as an escape."""
    entries = [
        f'{{"id":"{chart.id}","over_steps":{str(chart.over_steps).lower()},"figure":{chart.figure.to_json(engine="json")}}}'
        for chart in drawn
        if chart.figure is not None
    ]
    content = ",\n".join(entries)
    return f'<script type="application/json" id="charts">[{content}]</script>'
