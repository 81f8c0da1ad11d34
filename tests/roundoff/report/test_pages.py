"""report.html and probe.html: all that was found is in them, names are text, and nothing else runs or is fetched."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from comparisons import make_comparison, make_run
from odd_probes import empty, extreme, nothing_known, of_tensors, renamed
from pages import Page, numbers
from roundoff.gradients.advice import said
from roundoff.report import html, probe_html
from roundoff.report.panels import style
from roundoff.verdict.types import Comparison, Failure
from samples import MODES, TENSORS, sample

NAMES = (
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(2)</script>",
    "%{y} {x} <b>bold</b> & $x$ \u202e",
    "a'b\"c",
)
EVIL = NAMES[1] + NAMES[0] + "$x$"


def page_of(tmp_path: Path, subject: Comparison | dict[str, Any]) -> Page:
    path = tmp_path / "page.html"
    if isinstance(subject, Comparison):
        html.write_html(path, subject)
    else:
        probe_html.write_html(path, subject)
    assert [p.name for p in tmp_path.iterdir()] == ["page.html"]  # nothing left beside it
    return Page(path.read_text(encoding="utf-8"))


def places(page: Page) -> list[str | None]:
    return [attrs["id"] for tag, attrs in page.tags if tag == "div" and "id" in attrs]


def texts(value: Any) -> Iterator[str]:
    """Every text in a figure."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in value.values() if isinstance(value, dict) else value:
            yield from texts(entry)


def test_the_page_has_the_panels_of_the_comparison(tmp_path: Path) -> None:
    fp16 = make_run("manual", losses=[6.0, 5.5, 5.25 + 2**-20, 4.875])
    page = page_of(tmp_path, make_comparison([make_run("fp32"), fp16]))
    assert (
        list(page.charts) == places(page) == ["verdicts", "loss", "difference", "size", "validation", "scale", "norm"]
    )
    assert numbers(page.charts["loss"]["data"][1]["customdata"]) == fp16.steps["loss"]
    assert numbers(page.charts["size"]["data"][0]["y"])[2:] == [2**-20, 0.125]
    page = page_of(tmp_path, make_comparison([make_run("fp32", epochs=[])]))
    assert list(page.charts) == places(page) == ["loss", "scale", "norm"]
    for sentence in ("No other mode has a step", "No step differs", "No run has completed an epoch."):
        assert sentence in page.text


@pytest.mark.parametrize(
    "subject",
    [
        make_comparison(
            [make_run(n, config={"job": {n: n}, "<b>": n}, path=Path(n), problems=[n]) for n in NAMES],
            [Failure(NAMES[0] + "!", 1, [NAMES[1]], 1, NAMES[0])],
            list(NAMES),
        ),
        renamed(lambda name: name + EVIL),
    ],
    ids=["comparison", "probe"],
)
def test_names_are_text_and_the_page_runs_its_two_scripts_only(tmp_path: Path, subject: Any) -> None:
    page = page_of(tmp_path, subject)
    page.runs_only_its_scripts()
    assert not [tag for tag, _ in page.tags if tag in ("img", "b", "iframe", "object")]
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert len(page.scripts) == 3
    for name in NAMES[:2]:
        assert page.text.count(name) >= 6
    for figure in page.charts.values():
        for text in texts(figure):
            assert not re.search(r"<(?!/?(b|sup|extra)>|0)", text), text
        assert not any("alert" in trace.get("hovertemplate", "") for trace in figure["data"])
    if isinstance(subject, Comparison):
        names = [trace["name"] for trace in page.charts["loss"]["data"]]
        assert names[2] == r"%{y} {x} &lt;b&gt;bold&lt;/b&gt; &amp; $x$ \u202e"  # what turns text around is spelt out


def test_failures_alone_make_a_page_without_scripts(tmp_path: Path) -> None:
    failure = Failure("fp32", 1111, ["python", "main.py", "--data", "a b"], 2, "error: there is no such directory")
    page = page_of(tmp_path, make_comparison([], [failure]))
    assert "fp32 with seed 1111: failed with exit code 2: error: there is no such directory" in page.text
    assert "python main.py --data 'a b'" in page.text
    assert [text for _, text in page.scripts] == ["[]"]


def test_the_report_says_what_was_found_and_how_each_run_was_made(tmp_path: Path) -> None:
    job = {"model": "cnn", "lr": 0.05, "sizes": {"width": 3}}
    environment = {"device": "A GPU", "command": ["train.py", "--data", "a b"]}
    more = {"config": {"job": job, "environment": environment}, "applied": [False, True, True, True]}
    other = {"config": {"job": job | {"lr": 0.1}, "environment": environment | {"device": "A CPU"}}}
    runs = [make_run("fp32", problems=["last line cut"], **more), make_run("manual", **other)]
    page = page_of(tmp_path, make_comparison(runs, differences=["lr is 20 in a, 10 in b"]))
    for text in (
        "fp32, manual: 2 run(s) of training jobs that differ, the first (model cnn, ",
        ", lr 0.05, ",
        "), seed(s) 1111, on A GPU, A CPU. The reference is fp32;",
        "manual is equivalent to the reference.",
        "fp32 = manual: bit-equal",
        "Covers seeds.",
        "last line cut",
        "lr is 20 in a, 10 in b",
        "manual trains as well as fp32 in this job: the difference is -0.0010 nats [-0.0030, +0.0010], within 0.01.",
        "equivalent-0.0010[-0.0030, +0.0010]",
        "job sizes width3",
    ):
        assert text in page.text
    assert page.text.count("environment commandtrain.py --data 'a b'") == 2
    source = (tmp_path / "page.html").read_text(encoding="utf-8")
    marked = re.findall(r'<tr class=differs><th scope="row">([^<]*)</th>', source)
    assert {"job lr", "environment device"} <= set(marked)
    assert marked.count("job lr") == 2
    assert not {"job model", "environment command", "seed"} & set(marked)


def test_a_page_of_long_runs_has_a_bearable_size(tmp_path: Path) -> None:
    losses, scales = [5.0 + k % 9 for k in range(30_000)], [2.0 ** (k % 17) for k in range(30_000)]
    runs = [make_run(f"mode-{i}", losses=[loss + i / 64 for loss in losses], scales=scales) for i in range(6)]
    page_of(tmp_path, make_comparison(runs))
    assert (tmp_path / "page.html").stat().st_size < 8_000_000


def test_the_page_says_all_that_a_probe_found(tmp_path: Path) -> None:
    result = sample()
    page = page_of(tmp_path, result)
    assert list(page.charts) == places(page) == ["error", "bias", "heat"]
    for sentence in (said(result), *result["advice"], *result["covers"]):
        assert re.sub(r"\*\*|\^", "", sentence) in page.text
    assert page.source.count("2<sup>11</sup>") >= 3
    for shown in ("1.2e-03 ±5%", "loss scale 65536, float16 weights, float16 gradients", "worst: encoder.weight"):
        assert shown in page.text
    assert "logits9.1% / 9.1%0.012% / 0.012%0% / 0%" in page.text
    assert "peak_memory_bytes381 MiB" in page.text
    for name in TENSORS:
        assert page.text.count(name) >= len(MODES)
    page = page_of(tmp_path, result | {"about": "A net of 3 layers."})
    assert page.text.count("A net of 3 layers.") == 1


@pytest.mark.parametrize("make", [nothing_known, empty, extreme, lambda: of_tensors(1), lambda: of_tensors(40)])
def test_odd_results_make_a_page(tmp_path: Path, make: Callable[[], dict[str, Any]]) -> None:
    page = page_of(tmp_path, make())
    assert (
        places(page) == list(page.charts) == (["heat"] if make in (nothing_known, empty) else ["error", "bias", "heat"])
    )
    assert "None" not in page.text
    assert "nan" not in page.text


def test_equal_results_make_equal_pages(tmp_path: Path) -> None:
    for name in ("a", "b"):
        probe_html.write_html(tmp_path / name, sample())
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_probe_is_a_section_of_another_page() -> None:
    body, panels = probe_html.section(sample(), "Initial <weights>", "first-", {m: 7 - i for i, m in enumerate(MODES)})
    assert [panel.id for panel in panels] == ["first-error", "first-bias", "first-heat"]
    assert body[0] == "<h2>Initial &lt;weights&gt;</h2>"
    assert style(7).colour in "".join(body)
