"""`roundoff compare RUN...` and `compare.py RUN...`: one command under two names, from its words to its files."""

import json
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from programs import ROOT, Programs
from roundoff.__main__ import main
from synthetic import LOSSES, change_json, make_run

REPORT = {"summary.json", "report.html", "curves.png"}
COMMANDS = {"compare": (), "roundoff.__main__": ("compare",)}
"""Module -> the words in front."""


@pytest.fixture(params=COMMANDS)
def command(request, programs: Programs):
    """The programs, with the runs "a" and "b", which are equal, and others; and the module and first words."""
    for name, label, seed, losses in (("a", "fp32", 1, LOSSES), ("b", "amp-fp32", 1, LOSSES), ("empty", "fp32", 1, [])):
        make_run(programs.folder / name, label, seed, losses)
    make_run(programs.folder / "c", "manual", 1, [*LOSSES[:3], 9.0, *LOSSES[4:]])
    make_run(programs.folder / "other", "manual", job={"nhid": 5})
    (programs.folder / "file").write_text("")
    return programs, (request.param, *COMMANDS[request.param])


def test_a_report_of_run_directories(command) -> None:
    """Only the report is written, and only where --out says; the runs may stand before and after an option."""
    programs, words = command
    before = programs.files()
    done = programs.run(*words, "a", "--expect-equal", "fp32,amp-fp32", "b", "c", "--out", "new/place")
    assert (done.code, done.err) == (0, "")
    assert re.search(r"^manual +described +\+0\.0000 +5\.1250 +244\.69 +\+0\.0000 +4 +8 +0 +128$", done.out, re.M)
    assert "fp32 and amp-fp32: bit-equal for all 8 steps." in done.out
    said = "The report is in new/place/report.html, with curves.png and summary.json beside it.\n"
    assert done.out.endswith(said)
    after = programs.files()
    assert after.keys() - before.keys() == {"new", "new/place", *(f"new/place/{name}" for name in REPORT)}
    assert {name: after[name] for name in before} == before
    summary = json.loads(after["new/place/summary.json"])
    assert [mode["label"] for mode in summary["modes"]] == ["fp32", "amp-fp32", "manual"]
    assert (summary["pairs"][0]["equal"], summary["modes"][2]["first_difference"]) == (True, 4)


def test_a_pair_that_differs_is_exit_code_1_after_the_report(command) -> None:
    programs, words = command
    done = programs.run(*words, "a", "c", "--expect-equal", "fp32,manual", "--reference", "manual", "--out", "o")
    assert done.code == 1
    assert re.fullmatch(
        r"error: --expect-equal fp32,manual: fp32 and manual: differ first at step 4 [^\n]+\n", done.err
    )
    assert {path.name for path in (programs.folder / "o").iterdir()} == REPORT
    assert json.loads((programs.folder / "o/summary.json").read_text())["reference"] == "manual"


def test_the_options_are_heeded_and_a_report_needs_no_out(command) -> None:
    programs, words = command
    done = programs.run(*words, "a", "other", "--anyway", "--margin", "0.5")
    assert "nhid is 8 in a, 5 in other" in done.out
    (out,) = (programs.folder / "runs").iterdir()
    assert re.fullmatch(r"compare-\d{8}-\d{6}", out.name)
    assert {path.name for path in out.iterdir()} == REPORT
    assert json.loads((out / "summary.json").read_text())["margin"] == 0.5


MISTAKES = {
    "missing run": (["nowhere"], "nowhere: there is no such directory"),
    "file for run": (["file"], "file: this is no directory"),
    "run of no steps": (["empty"], "no steps"),
    "other job": (["a", "other"], "1111 in manual; leave some out, or add --anyway"),
    "unknown reference": (["a", "--reference", "manual"], "--reference: no run of the mode 'manual'"),
    "unknown pair": (["a", "--expect-equal", "fp32,manual"], "--expect-equal: no run of the mode 'manual'"),
    "half a pair": (["a", "--expect-equal", "fp32"], "'fp32' is not two different modes"),
    "pair of one": (["a", "--expect-equal", "fp32,fp32"], "not two different modes"),
    "negative margin": (["a", "--margin", "-1"], "--margin: '-1' is not a number above 0"),
    "unknown option": (["a", "--mode", "fp32", "b"], "unrecognized arguments: --mode"),
    "report below a file": (["a", "--out", "file/o"], "--out file/o: cannot write there"),
    "report is a file": (["a", "--out", "file"], "--out file: cannot write there"),
}


def test_an_unknown_option_is_named_alone(programs: Programs) -> None:
    said = "unrecognized arguments: --bogus (see roundoff compare --help)"
    assert said in programs.refuse("roundoff.__main__", "compare", "a", "--bogus", "b")


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(command, mistake: str) -> None:
    programs, words = command
    flags, told = MISTAKES[mistake]
    assert told in programs.refuse(*words, *flags)


MILLION = """
import resource, sys
from roundoff.__main__ import main
sys.argv = ["roundoff", "compare", *sys.argv[1:]]
code = main()
used = resource.getrusage(resource.RUSAGE_SELF)
print("used", code, used.ru_utime, used.ru_maxrss / 1024)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems count memory otherwise")
def test_a_run_of_a_million_steps(tmp_path: Path) -> None:
    """It is read, compared and drawn in under 15 s of a core and 1 GB, into a page of a bearable size."""
    run = make_run(tmp_path / "run", "fp32", losses=[6.0])
    rng, row = random.Random(0), json.loads((run / "steps.jsonl").read_text())
    with (run / "steps.jsonl").open("w") as file:
        for step in range(1, 10**6 + 1):
            noise = {"loss": 6 + rng.gauss(0, 0.1), "grad_norm": rng.gammavariate(2, 1)}
            file.write(
                json.dumps(row | noise | {"step": step, "epoch": 1 + step // 10**5, "applied": step % 999 > 0}) + "\n"
            )
    change_json(run / "result.json", steps=10**6)
    command = [sys.executable, "-c", MILLION, str(run), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True)
    code, seconds, megabytes = map(float, done.stdout.splitlines()[-1].split()[1:])
    assert (code, seconds < 15, megabytes < 1000) == (0, True, True), (seconds, megabytes)
    assert {path.name for path in (tmp_path / "out").iterdir()} == REPORT
    assert (tmp_path / "out/report.html").stat().st_size < 8_000_000


def test_the_program_itself(programs: Programs, monkeypatch, capsys) -> None:
    for words, told in (
        ([], "the following arguments are required: COMMAND (see roundoff --help)"),
        (["compare"], "the following arguments are required: RUN (see roundoff compare --help)"),
        (["probe"], "invalid choice: 'probe'"),
    ):
        assert told in programs.refuse("roundoff.__main__", *words)
    for words, told in ((["--help"], "put run directories side by side"), (["compare", "--help"], "exit with 1 if a")):
        done = programs.run("roundoff.__main__", *words)
        assert (done.code, done.err, told in done.out) == (0, "", True)
    monkeypatch.setattr("sys.argv", ["roundoff", "compare", "nowhere"])
    assert (main(), capsys.readouterr().err[:15]) == (2, "error: nowhere:")  # what the console script calls
    command = [sys.executable, "-m", "roundoff", "--version"]
    done = subprocess.run(command, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=False)
    assert re.fullmatch(r"roundoff [\d.]+ \(torch [^ ]+\)\n", done.stdout), done.stderr
