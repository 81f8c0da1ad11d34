"""The terminal's table and summary.json: the figures of the comparison, and nothing that a terminal would obey."""

import math
import os
from pathlib import Path
from typing import Any

import pytest

from programs import strict_json
from roundoff.report.summary import columns, grid, table, terminal_width, write_summary
from roundoff.runs.reading import read_run
from roundoff.verdict.comparison import compare_runs
from roundoff.verdict.types import Comparison, Failure
from synthetic import SEEDS, ending, make_run, make_runs

EVIL = "evil\x1b[2J\r\n\u202e<script>" + "x" * 300


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    ends = {"fp32": [4.5, 4.4, 4.6], "manual": [4.5 + 2**-10, 4.4, 4.5995], "amp-fp16": [4.7, 4.61, 4.8]}
    ends["amp-fp32"] = [4.5, 4.4]
    taken = [True, False] + [True] * 6
    rest: dict[str, Any] = {"amp-fp16": {"applied": taken, "peak_memory_bytes": 3 * 2**29, "test_loss": 5.75}}
    paths = [
        make_run(tmp_path / f"{mode}-{seed}", mode, seed, ending(end), **rest.get(mode, {}))
        for mode, losses in ends.items()
        for seed, end in zip(SEEDS, losses, strict=False)
    ]
    paths += make_runs(tmp_path, "amp-bf16", [None, None, None], status="diverged", tokens_per_second=None)
    runs = [read_run(path) for path in paths]
    return compare_runs(runs, [Failure("amp-fp32", 1113, ["main_amp.py"], 137, "killed")])


def grid_of(text: str) -> str:
    """The table without the sentences around it."""
    return text.partition("\n\n")[2].partition("\n\nColumns:")[0]


def cells(text: str, label: str) -> list[str]:
    (line,) = (line for line in grid_of(text).splitlines() if line.startswith(label + " "))
    return line.split()


def test_rows(comparison: Comparison, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundoff.report.summary.terminal_width", lambda: 170)
    text = table(comparison)
    same = ["+0.0000", "[+0.0000,", "+0.0000]"]
    tested = ["244.69", "-", "-", "24", "0", "1", "1000", "381", "MiB"]
    assert cells(text, "fp32") == ["fp32", "reference", "-", "4.5000", *tested]
    assert cells(text, "manual")[:6] == ["manual", "equivalent", "+0.0002", "[-0.0017,", "+0.0020]", "4.5002"]
    assert cells(text, "manual")[6:] == ["244.69", *same, "5", "24", "0", "128", "1000", "381", "MiB"]
    # 0.2, 0.21, 0.2: the error is 0.01 / 3, and t(0.975, 2) is 4.3027.
    assert cells(text, "amp-fp16")[1:6] == ["worse", "+0.2033", "[+0.1890,", "+0.2177]", "4.7033"]
    further = ["+0.2500", "[+0.2500,", "+0.2500]", "5", "21", "3", "65536", "1000", "1.5", "GiB"]
    assert cells(text, "amp-fp16")[6:] == ["314.19", *further]
    assert cells(text, "amp-fp32")[1:6] == ["described", *same, "4.4500"]
    assert cells(text, "amp-bf16")[1:] == ["diverged", "-", "-", "-", "-", "5", "24", "0", "1", "-", "381", "MiB"]
    assert max(len(line) for line in grid_of(text).splitlines()) <= 170
    assert len(columns(comparison)) == 12


def test_sentences_under_the_table(comparison: Comparison) -> None:
    text = table(comparison)
    lines = [line.strip() for line in text.splitlines()]
    assert lines[0] == (
        "manual trains as well as fp32 in this job: the difference is +0.0002 nats [-0.0017, +0.0020], within 0.01."
    )
    for mode in comparison.modes:
        assert mode.verdict.sentence in lines
    for sentence in comparison.covers:
        assert sentence in lines
    failed = "amp-fp32 with seed 1113: failed with exit code 137: killed"
    assert [line for line in lines if line.startswith(failed)]
    path = comparison.modes[4].runs[0].path
    assert f"amp-bf16 with seed 1111: diverged after step 8 ({path})" in lines
    assert "fp32 and amp-fp32: bit-equal in the 16 steps that both have, but seed 1113 has a run of fp32 only." in lines
    assert "Not the same job:" not in lines


def test_problems_and_differences(tmp_path: Path) -> None:
    paths = [make_run(tmp_path / "a"), make_run(tmp_path / "b", "manual", job={"bptt": 70})]
    (paths[0] / "epochs.jsonl").unlink()
    lines = [line.strip() for line in table(compare_runs([read_run(path) for path in paths], anyway=True)).splitlines()]
    assert f"{paths[0]}: epochs.jsonl is missing" in lines
    assert f"bptt is 35 in {paths[0]}, 70 in {paths[1]}" in lines


def test_no_escape_reaches_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundoff.report.summary.terminal_width", lambda: 170)
    paths = [make_run(tmp_path / "a\x1b[31m", status=None), make_run(tmp_path / "b", EVIL, job={"model": EVIL})]
    comparison = compare_runs([read_run(path) for path in paths], [Failure("fp32", 2, [], 1, EVIL)], anyway=True)
    text = table(comparison)
    assert text.replace("\n", "").isprintable()
    assert "evil\\x1b[2J\\r\\n\\u202e" in text
    assert "a\\x1b[31m" in text
    lines = grid_of(text).splitlines()
    assert len(lines) == 3 + 1 + 2
    assert max(map(len, lines)) <= 170


def test_summary_has_the_figures(comparison: Comparison, tmp_path: Path) -> None:
    write_summary(tmp_path / "summary.json", comparison)
    summary = strict_json((tmp_path / "summary.json").read_text(encoding="utf-8"))
    said_first = ["said", "reference", "margin", "modes", "pairs", "covers", "differences", "probes", "end"]
    assert list(summary) == [*said_first, "equivalences", "looks", "accepted"]
    assert summary["said"] == table(comparison).partition("\n\n")[0].splitlines()
    assert (summary["reference"], summary["margin"]) == ("fp32", 0.01)
    manual = summary["modes"][1]
    expected = comparison.modes[1]
    assert manual["verdict"] == vars(expected.verdict) | {"interval": list(expected.verdict.interval or ())}
    assert manual["test_difference"] == vars(expected.test_difference) | {"interval": [0.0, 0.0]}
    for name in ("label", "status", "end_loss", "test_loss", "test_ppl", "first_difference", "steps", "skipped"):
        assert manual[name] == getattr(expected, name)
    end = 4.5 + 2**-10
    assert manual["runs"][0] == {
        "path": str(expected.runs[0].path),
        "seed": 1111,
        "status": "finished",
        "device_name": "A CPU x 2",
        "environment": expected.runs[0].config["environment"],
        "epochs": [
            {"epoch": 1, "valid_loss": 6.125, "valid_ppl": math.exp(6.125), "lr": 20.0, "seconds": 1.5}
            | {"train_loss": 6.125},
            {"epoch": 2, "valid_loss": end, "valid_ppl": math.exp(end), "lr": 20.0, "seconds": 1.5}
            | {"train_loss": end},
        ],
        "test_loss": 5.5,
        "steps": 8,
        "problems": [],
    }
    assert summary["modes"][3]["failures"][0] == vars(comparison.modes[3].failures[0])
    assert summary["modes"][4]["test_ppl"] is None
    assert summary["pairs"] == [vars(pair) for pair in comparison.pairs]


def test_mean_training_loss_of_an_epoch(tmp_path: Path) -> None:
    """Of the finite losses, whether the step was applied or not."""
    losses = [6.0, math.nan, 4.0, math.inf, 2.0, 2.5, 3.0, 8.0, math.nan, math.nan, math.nan, math.nan, 1.0]
    applied = [True, False, True, False, True, True, True, False, False, False, False, False, True]
    run = make_run(tmp_path / "a", losses=losses, applied=applied, steps_per_epoch=4, valid_losses=[5.0, 4.5, 4.25])
    write_summary(tmp_path / "summary.json", compare_runs([read_run(run)]))
    (written,) = strict_json((tmp_path / "summary.json").read_text(encoding="utf-8"))["modes"][0]["runs"]
    assert [row["train_loss"] for row in written["epochs"]] == [5.0, 3.875, None]
    assert [row["valid_loss"] for row in written["epochs"]] == [5.0, 4.5, 4.25]


def test_summary_of_nan_and_inf_is_strict_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("roundoff.report.summary.terminal_width", lambda: 170)
    paths = [make_run(tmp_path / "a", test_loss=math.inf), make_run(tmp_path / "b", "manual", test_loss=math.nan)]
    comparison = compare_runs([read_run(path) for path in paths])
    assert "nan" in cells(table(comparison), "manual")
    write_summary(tmp_path / "summary.json", comparison)
    modes = strict_json((tmp_path / "summary.json").read_text(encoding="utf-8"))["modes"]
    assert [mode["test_ppl"] for mode in modes] == ["inf", "nan"]


def test_a_path_that_is_not_utf8(tmp_path: Path) -> None:
    path = make_run(tmp_path / os.fsdecode(b"a\xff"))
    comparison = compare_runs([read_run(path)])
    assert table(comparison).isascii()
    write_summary(tmp_path / "summary.json", comparison)
    assert strict_json((tmp_path / "summary.json").read_text("utf-8"))["modes"][0]["runs"][0]["path"] == str(path)


def test_summary_is_written_whole_or_not_at_all(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out" / "summary.json"
    target.parent.mkdir()
    target.write_text("old")

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_summary(target, comparison)
    assert [(path.name, path.read_text()) for path in target.parent.iterdir()] == [("summary.json", "old")]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_a_table_fits_its_width(comparison: Comparison, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts where it must, each of which names the modes; no cell is lost, and no word of a head is cut."""
    monkeypatch.setattr("roundoff.report.summary.terminal_width", lambda: 1000)
    whole = grid_of(table(comparison))
    monkeypatch.setattr("roundoff.report.summary.terminal_width", lambda: width)
    text = grid_of(table(comparison))
    assert max(len(line) for line in text.splitlines()) <= max(width, 50)  # a mode and its interval
    assert set(text.split()) - set(whole.split()) <= {line for line in text.split() if set(line) == {"-"}}
    assert set(text.split()) >= {word for word in whole.split() if set(word) != {"-"}}
    assert all(part.count("manual") == 1 for part in text.split("\n\n"))


def test_heads_have_a_line_for_each_word_before_a_table_is_parted() -> None:
    text = grid([["a", "1"]], {"a long head": "left", "b": "right"}, 8)
    assert text.splitlines() == ["a     b", "long", "head", "----  -", "a     1"]


def test_the_width_is_the_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    assert terminal_width() == 100, "a pipe has none"
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "77")
    assert terminal_width() == 77
