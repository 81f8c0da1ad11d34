"""A page of the reports, taken apart."""

import base64
import hashlib
import json
import math
import re
from html.parser import HTMLParser
from typing import Any

import numpy as np


class Page(HTMLParser):
    """Elements with their attributes, text outside of scripts, and the scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.source = text
        self.text = ""
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))

    def handle_data(self, data: str) -> None:
        if self.lasttag == "script" and self.scripts and data.strip():
            attrs, before = self.scripts[-1]
            self.scripts[-1] = (attrs, before + data)
        else:
            self.text += data

    @property
    def charts(self) -> dict[str, Any]:
        def refuse(constant: str) -> None:
            raise AssertionError(f"{constant} is not JSON")

        found = next(text for attrs, text in self.scripts if attrs.get("id") == "charts")
        assert "<" not in found  # nothing in it can end the script
        return {chart["id"]: chart["figure"] for chart in json.loads(found, parse_constant=refuse)}

    def runs_only_its_scripts(self) -> None:
        """By its policy Plotly and the page's own script, and nothing is fetched."""
        policy = next(attrs["content"] for tag, attrs in self.tags if tag == "meta" and "http-equiv" in attrs)
        assert policy is not None
        assert "default-src 'none'" in policy
        scripts = [text for attrs, text in self.scripts if "type" not in attrs]
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts]
        assert re.findall(r"'sha256-([^']+)'", policy) == hashes
        assert sum("plotly.js v" in text[:200] for text in scripts) == 1
        for _, attrs in self.tags:
            assert "src" not in attrs
            assert (attrs.get("href") or "#").startswith(("#", "data:"))
        assert "@import" not in self.text
        assert "url(" not in self.text


def numbers(values: Any) -> list[float]:
    """A list, or the base64 array that Plotly writes."""
    if isinstance(values, dict):
        return np.frombuffer(base64.b64decode(values["bdata"]), dtype=values["dtype"]).astype(float).tolist()
    return [math.nan if value is None else float(value) for value in values]
