"""A page of the reports in a real browser, where there is one."""

import importlib.util
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BROWSER, DRIVER = shutil.which("chromium") or shutil.which("google-chrome"), shutil.which("chromedriver")
OPTIONS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--window-size=1200,900"),
)
REASON = (
    "selenium is not installed"
    if importlib.util.find_spec("selenium") is None
    else None
    if BROWSER and DRIVER
    else "no chromium with chromedriver is on the PATH"
)
"""Why there is none; None where there is one."""


@contextmanager
def opened(path: Path, drawn: int) -> Iterator[Any]:
    """The page `path` once its figures are drawn, of which there are `drawn`."""
    from selenium import webdriver
    from selenium.webdriver.support.ui import WebDriverWait

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER or ""
    for option in (*OPTIONS, f"--user-data-dir={path.parent / 'profile'}"):
        options.add_argument(option)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        driver.get(path.as_uri())
        WebDriverWait(driver, 30).until(lambda d: d.execute_script("return document.body.dataset.drawn") == str(drawn))
        yield driver
    finally:
        driver.quit()


def nothing_is_fetched(page: Any) -> None:
    """Assert it of the page itself and of what its scripts did."""
    messages = [json.loads(entry["message"])["message"] for entry in page.get_log("performance")]
    sent = [m["params"] for m in messages if m["method"] == "Network.requestWillBeSent"]
    # The browser's own first page asks for its parts too.
    urls = [request["request"]["url"] for request in sent if request["documentURL"] == page.current_url]
    assert page.current_url in urls
    assert [url for url in urls if url != page.current_url and not url.startswith(("data:", "blob:"))] == []
    assert page.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
