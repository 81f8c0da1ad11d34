"""compare.py --probe: what is probed of a comparison, what is kept, and how it is shown."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lm.launch import jobs as launch
from lm.launch.probe_jobs import run_probes
from lm.launch.probing.flags import OF_JOB
from pages import Page, numbers
from programs import Programs, strict_json
from roundoff.gradients.result import read_probe
from roundoff.report.html import write_html
from roundoff.report.summary import write_summary
from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import Comparison, Failure
from samples import sample
from synthetic import make_run

FAKE = """
import json, sys
from pathlib import Path
words = sys.argv[1:]
out, modes = Path(words[words.index("--out") + 1]), words[words.index("--modes") + 1].split(",")
if "--run" in words and {fails}:
    sys.exit("error: no checkpoint there")
result = json.loads(Path({template!r}).read_text())
result["environment"]["command"] = ["probe.py", *words]
result["modes"] = {{mode: result["modes"][mode] for mode in modes}}
out.mkdir()
(out / "probe.json").write_text(json.dumps(result))
"""


class Probes:
    """A comparison's folder, and a probe.py that takes no time: torch takes seconds to import."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.out = folder / "out"
        self.scripts = folder / "scripts"
        self.scripts.mkdir()
        self.fails = False
        monkeypatch.setattr(launch, "ROOT", self.scripts)
        runs = [make_run(self.out / "runs" / f"{label}-1111", label) for label in ("fp32", "manual", "amp-bf16")]
        for path in runs:
            config = json.loads((path / "config.json").read_text())
            job = {name: value for name, value in config["job"].items() if name in OF_JOB}
            (path / "config.json").write_text(
                json.dumps(config | {"options": config["options"] | job | {"seed": config["seed"]}})
            )
        (self.out / "compare.json").write_text("{}")
        self.runs = [read_run(path) for path in runs]

    def compare(self, reference: str = "fp32", failures: tuple[Failure, ...] = ()) -> Comparison:
        comparison = compare_runs(self.runs, failures, reference=reference)
        template = self.scripts / "template.json"
        template.write_text(json.dumps(sample()))
        (self.scripts / "probe.py").write_text(FAKE.format(template=str(template), fails=self.fails))
        comparison.probes.extend(run_probes(self.out, comparison))
        return comparison


@pytest.fixture
def probes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Probes:
    return Probes(tmp_path, monkeypatch)


def commands(comparison: Comparison) -> list[list[str]]:
    return [probe.result["environment"]["command"] for probe in comparison.probes if probe.result]


def test_fresh_weights_of_the_same_flags_and_those_at_the_end_are_probed(probes: Probes) -> None:
    comparison = probes.compare()
    fresh, final = commands(comparison)
    modes = ["--modes", "fp32,manual,amp-bf16", "--out"]
    assert fresh == [
        *("probe.py", *modes, str(probes.out / "probes/fp32-1111-initial"), "--batches", "7", "--data", "corpus", "--"),
        *("--batch_size=20", "--bptt=35", "--model=LSTM", "--emsize=8", "--nhid=8", "--nlayers=2", "--nhead=2"),
        *("--dropout=0.2", "--no-tied", "--optimizer=sgd", "--lr=20.0", "--clip=0.25", "--seed=1111"),
    ]
    assert final == [
        *("probe.py", *modes, str(probes.out / "probes/fp32-1111-final"), "--batches", "7"),
        *("--run", str(probes.out / "runs/fp32-1111")),
    ]
    assert [probe.title for probe in comparison.probes] == [
        "The gradient at the initial weights",
        "The gradient at the final weights",
    ]


def test_a_loss_scale_that_was_asked_for_is_that_of_the_probe(probes: Probes) -> None:
    path = probes.runs[0].path / "config.json"
    config = json.loads(path.read_text())
    config["options"] |= {"static_loss_scale": 2.0, "init_scale": 65536.0}
    path.write_text(json.dumps(config))
    fresh, _ = commands(probes.compare())
    assert fresh[-2:] == ["--seed=1111", "--static-loss-scale=2.0"]


def test_a_dynamic_scales_start_that_was_asked_for_is_that_of_the_probe(probes: Probes) -> None:
    """The reference may have no dynamic scale; so it is not among its options."""
    (probes.out / "compare.json").write_text(json.dumps({"options": {"init_scale": 4.0, "scale_window": 9}}))
    fresh, final = commands(probes.compare())
    assert fresh[-2:] == ["--seed=1111", "--init-scale=4.0"]
    assert final[-4:] == ["--run", str(probes.out / "runs/fp32-1111"), "--", "--init-scale=4.0"]


def test_what_was_probed_is_kept_unless_something_else_is_asked_for(
    probes: Probes, capsys: pytest.CaptureFixture[str]
) -> None:
    def stamps() -> dict[str, int]:
        return {path.parent.name: path.stat().st_mtime_ns for path in probes.out.glob("probes/*/probe.json")}

    probes.compare()
    assert "| probe initial          | seed 1111 | finished    | " in capsys.readouterr().out
    before = stamps()
    probes.compare()
    assert stamps() == before
    assert capsys.readouterr().out.count("| kept\n") == 2
    probes.compare(reference="manual")
    assert {name: stamps()[name] for name in before} == before
    assert stamps().keys() - before.keys() == {"manual-1111-initial", "manual-1111-final"}


@pytest.mark.parametrize("change", [lambda text: text[:-9], lambda text: text.replace('"7"', '"8"')])
def test_what_is_no_probe_or_another_one_is_made_anew(probes: Probes, change: Callable[[str], str]) -> None:
    first = probes.compare()
    path = first.probes[1].path / "probe.json"
    path.write_text(change(path.read_text()))
    (path.parent / "old").touch()
    kept = (first.probes[0].path / "probe.json").stat().st_mtime_ns
    assert probes.compare().probes == first.probes
    assert [file.name for file in path.parent.iterdir()] == ["probe.json"]
    assert (first.probes[0].path / "probe.json").stat().st_mtime_ns == kept


def test_a_mode_that_left_no_run_is_not_probed(probes: Probes) -> None:
    comparison = probes.compare(failures=(Failure("amp-fp16", 1111, [], 2, "this machine cannot"),))
    assert commands(comparison)[0][2] == "fp32,manual,amp-bf16"


def test_without_a_run_of_the_reference_nothing_is_probed(probes: Probes) -> None:
    comparison = probes.compare("amp-fp16", (Failure("amp-fp16", 1111, [], 2, "no"),))
    assert comparison.probes == []
    assert not (probes.out / "probes").exists()


def test_both_are_in_the_report_in_the_colours_of_the_curves(probes: Probes, tmp_path: Path) -> None:
    comparison = probes.compare("amp-bf16")
    write_html(tmp_path / "report.html", comparison)
    page = Page((tmp_path / "report.html").read_text())
    names = [f"probe-{i}-{name}" for i in (0, 1) for name in ("error", "bias", "heat")]
    assert [name for name in page.charts if name.startswith("probe-")] == names
    loss = {trace["name"]: trace["meta"] for trace in page.charts["loss"]["data"]}
    for i in (0, 1):
        error = page.charts[f"probe-{i}-error"]["data"]
        assert {trace["name"]: trace["meta"] for trace in error} == loss == {"amp-bf16": 0, "fp32": 1, "manual": 2}
        for trace in error:
            assert numbers(trace["x"])[0] == sample()["modes"][trace["name"]]["total"]["error_to_noise"]
    for text in ("The gradient at the initial weights", "The gradient at the final weights"):
        assert page.text.count(text) == 1
    assert page.text.count(sample()["advice"][1]) == 2
    page.runs_only_its_scripts()


def test_a_probe_that_fails_is_told_and_leaves_the_other(probes: Probes, tmp_path: Path) -> None:
    probes.fails = True
    comparison = probes.compare()
    assert [probe.problem for probe in comparison.probes] == [None, "no checkpoint there"]
    write_html(tmp_path / "report.html", comparison)
    page = Page((tmp_path / "report.html").read_text())
    assert "It failed: no checkpoint there" in page.text
    assert "probe-0-heat" in page.charts
    assert "probe-1-heat" not in page.charts
    write_summary(tmp_path / "summary.json", comparison)
    shown: list[dict[str, Any]] = strict_json((tmp_path / "summary.json").read_text())["probes"]
    assert [(probe["result"], probe["problem"]) for probe in shown] == [
        ("probe.json", None),
        (None, "no checkpoint there"),
    ]


@pytest.mark.slow
def test_from_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """With the real trainer and the real probe.py."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # threads that wait for each other's tiny parts take ten times as long
    programs = Programs(tmp_path, monkeypatch, capsys)
    tiny = ["--data", "corpus", "--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "20", "--epochs", "1"]
    done = programs.run("compare", "--probe", "--modes", "manual", "--out", "o", "--", *tiny)
    assert (done.code, done.err) == (0, "")
    initial, final = (read_probe(tmp_path / f"o/probes/manual-1111-{when}/probe.json") for when in ("initial", "final"))
    assert initial["job"]["weights"]["kind"] == "fresh"
    assert (final["job"]["weights"]["kind"], final["job"]["weights"]["steps"]) == ("run", 5)
    assert initial["batches"] == final["batches"] == 4
    assert all(initial["job"][name] == final["job"][name] for name in ("model", "corpus"))
    assert initial["total"] != final["total"]
    assert list(initial["modes"]) == list(final["modes"]) == ["manual"]
    for result in (initial, final):
        assert 1e-5 < result["modes"]["manual"]["total"]["error_to_noise"] < 0.1
        for sentence in result["advice"]:
            assert sentence in done.out
    page = Page((tmp_path / "o/report.html").read_text())
    assert {"probe-0-heat", "probe-1-heat"} < page.charts.keys()
    assert (tmp_path / "o/probes/manual-1111-final/probe.html").stat().st_size > 10**6
