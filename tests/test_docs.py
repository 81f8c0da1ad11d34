"""What the documentation says of versions and flags is what the code says; `make docs` checks its links."""

import re

import pytest

from lm.options.flag_table import page
from programs import ROOT
from roundoff import __version__


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def test_the_page_of_flags_is_of_these_options() -> None:
    assert read("docs/flags.md") == page()


@pytest.mark.parametrize(
    ("file", "pattern"),
    [
        ("CITATION.cff", r"^version: (.*)$"),
        ("CHANGELOG.md", r"^## \[(\d.*?)\]"),
        ("examples/cnn.py", r"roundoff-([\d.]+)-"),
    ],
)
def test_the_version_is_one(file: str, pattern: str) -> None:
    assert re.search(pattern, read(file), re.MULTILINE)[1] == __version__


def test_the_readme_fits_a_newcomer() -> None:
    """It is short, and every file that it links to is there."""
    text = read("README.md")
    assert text.count("\n") <= 160
    links = re.findall(r"\]\((?!http)([^)#]+)", text)
    assert len(links) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []
