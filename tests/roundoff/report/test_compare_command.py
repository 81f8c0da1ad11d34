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
from roundoff.report.compare_command import given_run, read_given
from synthetic import LOSSES, change_json, ending, make_run

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


EQUIVALENCES: dict[str, tuple[list[float], str | None]] = {
    "equivalent": ([0.001, -0.001, 0.002], None),
    "worse": ([0.5, 0.51, 0.49], "y is worse than the reference: .*"),
    "undecided": (
        [0.01, -0.02, 0.0],
        "y is shown neither to differ from the reference nor to equal it within 0.01 nats; .* it takes about "
        r"\d+ seeds to show equivalence .*",
    ),
    "described": ([0.0, 0.0], "y: .* described, not judged: a verdict takes 3 seeds or more."),
}  # fmt: skip


@pytest.mark.parametrize("case", EQUIVALENCES)
def test_a_pair_that_is_not_shown_equivalent_is_exit_code_1(programs, monkeypatch, case: str) -> None:
    """Whatever the reference of the table is."""
    differences, told = EQUIVALENCES[case]
    for seed, difference in enumerate(differences):
        for name, loss in (("x", 5.0), ("y", 5.0 + difference), ("z", 9.0)):
            make_run(programs.folder / f"{name}{seed}", "fp32", seed, ending(loss), None)
    for drawn in ("html.write_html", "png.write_png"):  # which take a second
        monkeypatch.setattr(f"roundoff.report.{drawn}", lambda *_: None)
    runs = [f"{name}={name}{seed}" for name in "xyz" for seed in range(len(differences))]
    done = programs.run(
        "roundoff.__main__", "compare", *runs, "--reference", "z", "--expect-equivalent", "x,y", "--out", "o"
    )
    said = "" if told is None else f"error: --expect-equivalent x,y: with x as the reference, {told}\n"
    assert (done.code, bool(re.fullmatch(said, done.err))) == (int(told is not None), True), done.err
    (found,) = json.loads((programs.folder / "o/summary.json").read_text())["equivalences"]
    assert (found["first"], found["second"], found["verdict"]["word"]) == ("x", "y", case)


def test_the_options_are_heeded_and_a_report_needs_no_out(command) -> None:
    programs, words = command
    done = programs.run(*words, "a", "other", "--anyway", "--margin", "0.5")
    assert "nhid is 8 in a, 5 in other" in done.out
    (out,) = (programs.folder / "runs").iterdir()
    assert re.fullmatch(r"compare-\d{8}-\d{6}", out.name)
    assert {path.name for path in out.iterdir()} == REPORT
    assert json.loads((out / "summary.json").read_text())["margin"] == 0.5


def test_names_for_runs(command, monkeypatch) -> None:
    """A path that is there is one, whatever is in it; after an option a name is a name too."""
    programs, words = command
    make_run(programs.folder / "lr=5", seed=1, job={"lr": 5})
    for given, expected in (
        (["slow=a", "lr=5"], ["slow", "fp32"]),
        (["slow=a", "it=lr=5", "all of it=b"], ["slow", "it", "all of it"]),
        (["lr=5/"], ["fp32"]),
    ):
        assert [run.label for run in read_given([given_run(word) for word in given])] == expected
    written = []
    monkeypatch.setattr("roundoff.report.compare_command.write_files", lambda _, found: written.append(found))
    done = programs.run(*words, "slow=a", "--out", "o", "fast=lr=5")
    assert (done.code, done.err) == (0, "")
    assert "lr is 20.0 in a, 5 in lr=5" in done.out
    assert [mode.label for mode in written[0].modes] == ["slow", "fast"]


MISTAKES = {
    "name of nothing": (["a", "b=nowhere"], "b=nowhere: there is no run 'nowhere' to be called 'b'"),
    "name alone": (["a", "b="], "b=: there is no run '' to be called 'b'"),
    "no name": (["=a"], "=a: a NAME=RUN needs a name, which has no comma"),
    "two names": (["--margin", "1", "x,y=a"], "x,y=a: a NAME=RUN needs a name, which has no comma"),
    "one run of two names": (["x=a", "x=b"], "a and b are both x with seed 1; leave one of them out"),
    "missing run": (["nowhere"], "nowhere: there is no such directory"),
    "file for run": (["file"], "file: this is no directory"),
    "run of no steps": (["empty"], "no steps"),
    "other job": (["a", "other"], "1111 in manual; leave some out, or add --anyway"),
    "unknown reference": (["a", "--reference", "manual"], "--reference: no run of the mode 'manual'"),
    "unknown pair": (["a", "--expect-equal", "fp32,manual"], "--expect-equal: no run of the mode 'manual'"),
    "half a pair": (["a", "--expect-equal", "fp32"], "'fp32' is not two different modes or names"),
    "unknown equivalence": (["a", "--expect-equivalent", "fp32,x"], "--expect-equivalent: no run of the mode 'x'"),
    "half an equivalence": (["a", "--expect-equivalent", "fp32,"], "--expect-equivalent: 'fp32,' is not two different"),
    "pair of one": (["a", "--expect-equal", "fp32,fp32"], "not two different modes or names"),
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
