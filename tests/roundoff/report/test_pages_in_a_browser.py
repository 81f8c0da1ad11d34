"""Both pages in a real browser, each opened once, since a browser takes seconds to start."""

import math
import random
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from browser import REASON, nothing_is_fetched, opened
from comparisons import make_comparison, make_run
from odd_probes import renamed
from roundoff.report import html, probe_html
from roundoff.verdict.types import Comparison
from samples import MODES, TENSORS

pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))
if REASON is None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

EVIL = "</script><script>document.hacked=1</script><img src=x onerror=document.hacked=1>"
LABELS = ["fp32", "manual", "<img src=x onerror=document.hacked=1>", EVIL[:43]]


def comparison() -> Comparison:
    rng = random.Random(0)
    base = [8 - i / 100 + rng.gauss(0, 0.1) for i in range(200)]
    runs = []
    for i, label in enumerate(LABELS):
        for seed in (1, 2):
            losses = [loss + seed / 10 + i * rng.gauss(0, 0.01) for loss in base]
            applied = [i != 3 or k % 50 > 0 for k in range(200)]
            scales = [65536.0 / (2 ** (k // 50) if i == 3 else 1) for k in range(200)]
            runs.append(make_run(label, seed, losses, applied=applied, scales=scales))
    runs[-1].steps["loss"][-20:] = [1e30] + [math.inf, math.nan] * 9 + [math.nan]
    return make_comparison(runs)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("report") / "report.html"
    html.write_html(path, comparison())
    with opened(path, drawn=7) as driver:
        yield driver


@pytest.fixture(scope="module")
def probe(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    path = tmp_path_factory.mktemp("probe") / "probe.html"
    probe_html.write_html(path, renamed(lambda name: name + EVIL if name in ("manual", "logits") else name))
    with opened(path, drawn=3) as driver:
        yield driver


def traces(page: Any, chart: str) -> list[dict[str, Any]]:
    """Mode and visibility of each trace, and whether it has a line on the screen."""
    found: list[dict[str, Any]] = page.execute_script(
        "const div = document.getElementById(arguments[0]);"
        "const drawn = [...div.querySelectorAll('.scatterlayer .trace')].filter(t => t.querySelector('path'));"
        "return div._fullData.map((t, i) => ({mode: div.data[i].meta, visible: t.visible,"
        "  drawn: drawn.some(g => g.__data__[0].trace.index === i)}))",
        chart,
    )
    return found


def zoom(page: Any, chart: str) -> list[float]:
    found: list[float] = page.execute_script(
        "return document.getElementById(arguments[0])._fullLayout.xaxis.range", chart
    )
    return found


def button(page: Any, mode: int) -> Any:
    return page.find_element(By.CSS_SELECTOR, f"nav button[data-mode='{mode}']")


def count(page: Any, css: str) -> int:
    return len(page.find_elements(By.CSS_SELECTOR, css))


def test_curves_are_on_the_screen(report: Any) -> None:
    counts = {
        chart: len(traces(report, chart)) for chart in ("loss", "difference", "size", "validation", "scale", "norm")
    }
    # Runs, and the pale steps of 4 modes, the 2 edges of the band, the crosses of 2 runs.
    assert counts == {"loss": 8 + 4 + 2, "difference": 6 + 2, "size": 6, "validation": 8, "scale": 8 + 2, "norm": 8 + 4}
    for chart in counts:
        assert all(trace["visible"] and trace["drawn"] for trace in traces(report, chart)), chart


@pytest.mark.slow
def test_a_probe_is_on_the_screen(probe: Any) -> None:
    parameters = sum(kind == "parameter" for kind, _, _ in TENSORS.values())
    for chart in ("error", "bias"):
        assert count(probe, f"#{chart} .scatterlayer .point") == len(MODES) * (parameters + 1)
        assert count(probe, f"#{chart} .ytick") == parameters + 1
    assert count(probe, "#heat .heatmaplayer image") == 1
    assert count(probe, "#heat .scatterlayer .point") == 2
    assert count(probe, "#heat .shapelayer path") == 2  # the window, and the scale to take
    assert count(probe, "#heat .ytick") == len(TENSORS)
    assert count(probe, "#heat .cbaxis text") >= 5


@pytest.mark.slow
def test_a_click_switches_a_mode_off_and_on_in_all_figures(report: Any, probe: Any) -> None:
    def shown(chart: str) -> dict[int, set[bool]]:
        found: dict[int, set[bool]] = {}
        for trace in traces(report, chart):
            found.setdefault(trace["mode"], set()).update({trace["visible"] is True, trace["drawn"]})
        return found

    assert button(report, 1).text == "manual"
    for state in (False, True):
        button(report, 1).click()
        WebDriverWait(report, 10).until(lambda _, state=state: shown("norm")[1] == {state})
        assert button(report, 1).get_attribute("aria-pressed") == str(state).lower()
        for chart in ("loss", "validation", "scale"):
            assert shown(chart) == {0: {True}, 1: {state}, 2: {True}, 3: {True}}
        assert shown("difference")[1] == {state}
        button(probe, 2).click()
        assert [trace["visible"] for trace in traces(probe, "error")] == [True, True, state, True, True]
        assert [trace["visible"] for trace in traces(probe, "heat")] == [True, True]  # which are of no mode


def test_a_double_click_shows_a_mode_alone_and_another_one_all(report: Any) -> None:
    for alone in (True, False):
        # One by one, since a browser takes slow clicks for two single ones.
        button(report, 2).click()
        button(report, 2).click()
        report.execute_script("arguments[0].dispatchEvent(new MouseEvent('dblclick'))", button(report, 2))
        wanted = {0: not alone, 1: not alone, 2: True, 3: not alone}
        WebDriverWait(report, 10).until(
            lambda _, wanted=wanted: {t["mode"]: t["visible"] for t in traces(report, "norm")} == wanted
        )


def test_zoom_is_the_same_in_all_figures_over_steps(report: Any) -> None:
    before = zoom(report, "validation")
    report.execute_script("Plotly.relayout('loss', {'xaxis.range': [50, 100]})")
    for chart in ("loss", "difference", "size", "scale", "norm"):
        WebDriverWait(report, 10).until(lambda _, chart=chart: zoom(report, chart) == [50, 100])
    assert zoom(report, "validation") == before


def test_the_pointer_finds_the_exact_loss_of_each_mode(report: Any) -> None:
    report.execute_script("Plotly.relayout('loss', {'xaxis.range': [76.5, 79.5]})")  # step 78 in the middle
    WebDriverWait(report, 10).until(lambda _: zoom(report, "norm") == [76.5, 79.5])
    report.execute_script("document.getElementById('loss').scrollIntoView({block: 'center'})")
    ActionChains(report).move_to_element(report.find_element(By.CSS_SELECTOR, "#loss .nsewdrag")).perform()
    script = "return document.querySelector('#loss .hoverlayer').textContent"
    text = WebDriverWait(report, 10).until(lambda d: d.execute_script(script))
    for mode in comparison().modes:
        found = re.search(re.escape(mode.label) + r" : [0-9.]+ \(this step exactly ([0-9.]+)\)", text)
        assert found, text
        assert np.float32(found[1]) == np.float32(mode.runs[0].steps["loss"][77])


def test_verdict_and_interval_fit_a_narrow_screen_and_dark_is_dark(report: Any) -> None:
    """The table of the verdicts is no wider than 400 pixels, and the paper follows the browser's scheme."""
    screen = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": False}
    report.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    cells = "[...document.querySelector('.results').querySelectorAll('td')]"
    assert max(report.execute_script(f"return {cells}.map(cell => cell.getBoundingClientRect().right)")) <= 400
    paper = "return getComputedStyle(document.body).backgroundColor"
    for scheme, colour in (("light", "rgb(255, 255, 255)"), ("dark", "rgb(18, 18, 18)")):
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        assert report.execute_script(paper) == colour
    report.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    report.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    for css in ("th:not([scope])", ".chart:not([aria-label])"):
        assert count(report, css) == 0


@pytest.mark.slow
@pytest.mark.parametrize("width", [400, 1200])
def test_the_page_is_no_wider_than_the_screen(probe: Any, width: int) -> None:
    probe.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    found = "return document.documentElement.scrollWidth"
    WebDriverWait(probe, 10).until(lambda d: d.execute_script(found) <= width)  # Plotly follows a little later


@pytest.mark.slow
def test_names_are_text_and_the_console_stays_empty(report: Any, probe: Any) -> None:
    for page in (report, probe):
        assert page.execute_script("return document.hacked") is None
        assert page.find_elements(By.TAG_NAME, "img") == []
        assert page.get_log("browser") == []
    for label in LABELS:
        assert label in report.find_element(By.CSS_SELECTOR, "nav").text
    assert EVIL[:60] in probe.find_element(By.CSS_SELECTOR, ".results").text


@pytest.mark.slow
def test_nothing_is_fetched_or_offered_for_upload(report: Any, probe: Any) -> None:
    for page in (report, probe):
        nothing_is_fetched(page)
        titles = {e.get_attribute("data-title") for e in page.find_elements(By.CSS_SELECTOR, ".modebar-btn")}
        assert len(titles) > 3
        assert not [title for title in titles if "loud" in str(title) or "hare" in str(title) or "plotly" in str(title)]
