"""probe.html in a real browser: one page for all tests, since a browser takes seconds to start."""

from collections.abc import Iterator
from typing import Any

import pytest

from browser import REASON, nothing_is_fetched, opened
from odd_probes import renamed
from roundoff.report.probe_html import write_html
from samples import MODES, TENSORS

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if REASON is None:
    from selenium.webdriver.support.ui import WebDriverWait

EVIL = "</script><script>document.hacked=1</script><img src=x onerror=document.hacked=1>"
VISIBLE = "return document.getElementById(arguments[0])._fullData.map(t => t.visible)"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("browser")
    write_html(folder / "probe.html", renamed(lambda name: name + EVIL if name in ("manual", "logits") else name))
    with opened(folder / "probe.html", drawn=3) as driver:
        yield driver


def count(page: Any, css: str) -> int:
    return len(page.find_elements("css selector", css))


def test_every_figure_is_on_the_screen(page: Any) -> None:
    parameters = sum(kind == "parameter" for kind, _, _ in TENSORS.values())
    for chart in ("error", "bias"):
        assert count(page, f"#{chart} .scatterlayer .point") == len(MODES) * (parameters + 1)
        assert count(page, f"#{chart} .ytick") == parameters + 1
    assert count(page, "#heat .heatmaplayer image") == 1
    assert count(page, "#heat .shapelayer path") == 2  # the window, and the scale to take
    assert count(page, "#heat .ytick") == len(TENSORS)
    assert count(page, "#heat .cbaxis text") >= 5


def test_a_button_switches_a_mode_and_leaves_what_is_of_none(page: Any) -> None:
    button = page.find_element("css selector", "nav button[data-mode='2']")
    for state in (False, True):
        button.click()
        assert page.execute_script(VISIBLE, "error") == [True, True, state, True, True]
        assert page.execute_script(VISIBLE, "heat") == [True, True]


@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_no_wider_than_the_screen(page: Any, width: int) -> None:
    page.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    found = "return document.documentElement.scrollWidth"
    WebDriverWait(page, 10).until(lambda d: d.execute_script(found) <= width)  # Plotly follows a little later


def test_names_are_text_and_the_console_stays_empty(page: Any) -> None:
    assert page.execute_script("return document.hacked") is None
    assert page.find_elements("tag name", "img") == []
    assert EVIL[:60] in page.find_element("css selector", ".results").text
    assert page.get_log("browser") == []


def test_nothing_is_fetched(page: Any) -> None:
    nothing_is_fetched(page)
