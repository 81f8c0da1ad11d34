"""compare.py from the command line to the exit code, with the real trainers as its processes."""

import io
import json
import re
import shutil
import signal
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

import compare
import jobs
from lm.launch.jobs import Training, comparison_folder
from lm.options.modes import DEFAULT_MODES
from programs import Done, Programs, start, write_corpus
from roundoff.errors import UsageError
from roundoff.verdict.types import Failure
from synthetic import ending, make_run

REPORT = {"summary.json", "report.html", "curves.png"}
TINY = ["--data", "corpus", "--emsize", "8", "--nhid", "8", "--batch_size", "4", "--bptt", "5", "--epochs", "2"]
# Half gradients overflow at this scale, fp32 ones do not; neither do powers of two change a bit of those.
TOO_HIGH = ["--static-loss-scale", str(2**24), "--max-skipped", "5"]
THREE = [
    *("--modes", "fp32,manual,amp-fp32", "--out", "out", "--jobs", "2", "--expect-equal", "fp32,amp-fp32"),
    *("--", *TINY, *TOO_HIGH),
]


@pytest.fixture
def programs(tmp_path, monkeypatch, capsys) -> Programs:
    return Programs(tmp_path, monkeypatch, capsys)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> tuple[Path, Done]:
    """A folder with a corpus and a comparison "out" of three modes, of which one diverges; and what was said."""
    folder = tmp_path_factory.mktemp("three")
    write_corpus(folder / "corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setattr("sys.argv", ["compare.py", *THREE])
        with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
            code = compare.exit_code(compare.main)
    return folder, Done(code, out.getvalue(), err.getvalue())


def result(folder: Path, run: str) -> dict:
    return json.loads((folder / "out/runs" / run / "result.json").read_text())


@pytest.mark.slow
def test_a_mode_that_fails_leaves_the_others(three) -> None:
    folder, done = three
    assert (done.code, done.err) == (0, "")
    assert result(folder, "fp32-1111")["status"] == result(folder, "amp-fp32-1111")["status"] == "finished"
    assert result(folder, "manual-1111")["status"] == "diverged"
    assert re.search(
        r"^\| manual +\| seed 1111 \| diverged +\| [\d.]+s \| exit code 1: main.py in mode", done.out, re.M
    )
    assert re.search(r"^\| fp32 +\| seed 1111 \| finished +\| test ppl +[\d.]+ \| [\d.]+s$", done.out, re.M)
    assert done.out.count("| seed 1111 |") == 3
    assert done.out.endswith("The report is in out/report.html, with curves.png and summary.json beside it.\n")
    assert "\r" not in done.out  # not a terminal: no byte of a progress bar


def test_what_is_left(three) -> None:
    folder, _ = three
    names = {str(path.relative_to(folder / "out")) for path in (folder / "out").rglob("*")}
    runs = {f"runs/{label}-1111" for label in ("fp32", "manual", "amp-fp32")}
    files = {f"{run}/{name}" for run in runs for name in ("config.json", "steps.jsonl", "epochs.jsonl", "result.json")}
    later = ("model.safetensors", "checkpoint.safetensors", "checkpoint.previous.safetensors")
    models = {f"{run}/{name}" for run in runs - {"runs/manual-1111"} for name in later}  # it has seen no validation
    assert names == REPORT | {"compare.json", "runs"} | runs | {f"{run}.log" for run in runs} | files | models
    assert {path.name for path in folder.iterdir()} == {"corpus", "out"}
    assert all((folder / "out" / name).stat().st_size > 100 for name in REPORT)
    log = (folder / "out/runs/manual-1111.log").read_text()
    assert "has diverged" in log


def test_every_mode_trains_the_same_job(three) -> None:
    folder, _ = three
    runs = [folder / "out/runs" / f"{label}-1111" for label in ("fp32", "manual", "amp-fp32")]
    configs = [json.loads((run / "config.json").read_text()) for run in runs]
    assert [config["precision"]["mode"] for config in configs] == ["fp32", "manual", "amp-fp32"]
    for name in ("seed", "job"):
        assert configs[0][name] == configs[1][name] == configs[2][name]
    assert {config["precision"]["loss_scale"] for config in configs} == {2.0**24}
    assert configs[0]["environment"]["threads"] == configs[2]["environment"]["threads"] == 1  # two share one
    assert [row["loss"] for row in jobs.rows(runs[0])] == [row["loss"] for row in jobs.rows(runs[2])]
    assert not any(row["applied"] for row in jobs.rows(runs[1]))


def test_the_summary_of_the_three(three) -> None:
    summary = json.loads((three[0] / "out/summary.json").read_text())
    assert summary["reference"] == "fp32"
    assert [mode["label"] for mode in summary["modes"]] == ["fp32", "manual", "amp-fp32"]
    failed = {mode["label"]: [failure["exit_code"] for failure in mode["failures"]] for mode in summary["modes"]}
    assert failed == {"fp32": [], "manual": [1], "amp-fp32": []}
    equal = {(pair["first"], pair["second"]): pair["equal"] for pair in summary["pairs"]}
    assert equal[("fp32", "amp-fp32")] is True


@pytest.fixture
def continued(three, tmp_path, monkeypatch, capsys) -> Programs:
    """A copy of the three's folder to go on in."""
    programs = Programs(tmp_path, monkeypatch, capsys)
    shutil.rmtree(tmp_path / "corpus")
    shutil.copytree(three[0], tmp_path, dirs_exist_ok=True)
    return programs


def stamps(folder: Path) -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_what_was_interrupted_is_run_again_and_nothing_else(three, continued) -> None:
    runs = continued.folder / "out/runs"
    interrupted = result(three[0], "amp-fp32-1111") | {"status": "interrupted", "steps": 3}
    (runs / "amp-fp32-1111/result.json").write_text(json.dumps(interrupted))
    kept = [runs / "fp32-1111", runs / "manual-1111"]
    before = [stamps(folder) for folder in kept]
    done = continued.run("compare", *THREE)
    assert (done.code, done.err) == (0, "")
    assert [stamps(folder) for folder in kept] == before
    again = result(continued.folder, "amp-fp32-1111")
    assert (again["status"], again["test_loss"]) == ("finished", result(three[0], "amp-fp32-1111")["test_loss"])
    kept_lines = re.findall(r"^\| ([\w-]+) .* \| kept", done.out, re.M)
    assert kept_lines == ["fp32", "manual"]
    assert "| kept | exit code 1: main.py in mode manual has diverged" in done.out  # its failure is told again
    assert len(jobs.rows(runs / "amp-fp32-1111")) == again["steps"] == 36  # none of the old steps is left


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (["--modes", "fp32,manual"], "modes"),
        (["--jobs", "1"], "jobs"),
        (["--seeds", "2"], "seeds [1111], now [1111, 1112]"),
        (["--", *TINY], "options"),
        (["--", *TINY, *TOO_HIGH, "--seed", "5"], "seeds [1111], now [5]"),
    ],
)
def test_another_comparison_in_the_same_folder_is_refused(continued, change, told) -> None:
    flags = THREE[: THREE.index("--")] if "--" in change else THREE
    split = flags.index("--") if "--" in flags else len(flags)
    err = continued.refuse("compare", *flags[: split - 2], *change, *flags[split:])
    assert "--out out was made with " in err
    assert told in err


TRAIN = ["--out", "o", "--", *TINY]
MISTAKES = {
    "unknown mode": (["--modes", "fp32,fp8", *TRAIN], r"'fp8' is no mode; there are fp32, manual, .*amp-fp32"),
    "mode twice": (["--modes", "fp32,fp32", *TRAIN], "named twice"),
    "no mode": (["--modes", "", *TRAIN], "'' is no mode"),
    "no seeds": (["--seeds", "0", *TRAIN], "--seeds: '0' is not a whole number of at least 1"),
    "no seed of auto": (["--seeds", "auto:2", *TRAIN], "--seeds: '2' is not a whole number of at least 3"),
    "no number of auto": (["--seeds", "auto:", *TRAIN], "--seeds: '' is not a whole number of at least 3"),
    "auto misspelt": (["--seeds", "Auto", *TRAIN], "--seeds: 'Auto' is not a whole number of at least 1"),
    "auto of runs": (["a", "--seeds", "auto"], "--seeds is for modes to run"),
    "equivalence not run": (
        ["--expect-equivalent", "fp32,bf16", "--modes", "fp32", *TRAIN],
        "'amp-bf16' is not one of",
    ),
    "no jobs": (["--jobs", "0", *TRAIN], "--jobs"),
    "run and modes": (["a", "--modes", "fp32"], "--modes is for modes to run, and RUN is one that has run"),
    "run and probe": (["a", "--probe"], "--probe is for modes to run"),
    "run and trainer flags": (["a", "--", "--nhid", "8"], "-- is for modes to run"),
    "reference not run": (["--modes", "manual", "--reference", "fp32", *TRAIN], "'fp32' is not one of --modes manual"),
    "pair not run": (["--expect-equal", "fp32,amp-fp32", *TRAIN], "'amp-fp32' is not one of --modes"),
    "out is a file": (["--out", "file", "--", *TINY], "--out file"),
    "out below a file": (["--out", "file/o", "--", *TINY], "--out file/o: cannot write there"),
    "out of something else": (["--out", "corpus", "--", *TINY], "--out corpus holds something else"),
    "trainer's mode": ([*TRAIN, "--fp16"], "--fp16 after -- is set by compare.py itself"),
    "trainer's dtype": ([*TRAIN, "--dtype=float32"], "--dtype after -- is set by compare.py itself"),
    "trainer's records": ([*TRAIN, "--run-dir", "x"], "--run-dir after --"),
    "trainer's model": ([*TRAIN, "--save", "x"], "--save after --"),
    "trainer's resume": ([*TRAIN, "--resume", "x"], "--resume after --"),
    "one file of all": ([*TRAIN, "--onnx-export", "x.onnx"], "--onnx-export after -- names one file for all runs"),
    "trainer's unknown flag": ([*TRAIN, "--hidden", "8"], "unrecognized arguments: --hidden 8"),
    "trainer's value": ([*TRAIN, "--nhid", "none"], "--nhid"),
    "no value": ([*TRAIN, "--seed"], "--seed: expected one argument"),
    "flag of one trainer": (
        [*TRAIN, "--scale-window", "9", "--fp16-utils", "own"],
        r"--fp16-utils after --: main.py \(mode fp32\) has no such option",
    ),
    "no corpus": (["--out", "o", "--", "--data", "nowhere"], "--data nowhere: there is no such folder"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_and_leaves_nothing(programs, mistake) -> None:
    make_run(programs.folder / "a")
    (programs.folder / "file").write_text("")
    flags, told = MISTAKES[mistake]
    assert re.search(told, programs.refuse("compare", *flags))


def test_nothing_to_compare(programs, monkeypatch) -> None:
    (programs.folder / "scripts").mkdir()
    for name in ("main", "main_amp"):
        (programs.folder / f"scripts/{name}.py").write_text("import sys; sys.exit('error: out of luck')")
    monkeypatch.setattr("lm.launch.jobs.ROOT", programs.folder / "scripts")
    done = programs.run("compare", "--modes", "manual,amp-fp16", "--seeds", "2", *TRAIN, "--seed", "7")
    assert done.code == 1
    assert done.err == (
        "error: no run left anything to compare (manual seed 7, amp-fp16 seed 7, manual seed 8, amp-fp16 seed 8); "
        "the first one: out of luck\n"
    )
    assert done.out.count(" | failed      | ") == 4
    assert not (programs.folder / "o/report.html").exists()


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"[" * 100_000, "holds something else"),
        (b'{"modes": 1}', "holds something else"),
        (b"\xff", "holds something else"),
        (b'{"modes": "\\u001b[2J\\n", "seeds": null}', r"was made with modes \\x1b\[2J\\n, now \['fp32'\]; seeds None"),
    ],
)
def test_a_plan_made_to_do_harm(tmp_path: Path, content: bytes, said: str) -> None:
    (tmp_path / "compare.json").write_bytes(content)
    with (
        pytest.raises(UsageError, match=said) as error,
        comparison_folder(tmp_path, {"modes": ["fp32"], "seeds": [1]}),
    ):
        pass
    assert str(error.value).isprintable()


@pytest.mark.slow
def test_ctrl_c_as_a_user_sends_it(tmp_path) -> None:
    """While two trainers are at work: both end, no process stays behind, and it is said how to go on."""
    write_corpus(tmp_path / "corpus")
    flags = ["--modes", "fp32,amp-bf16", "--jobs", "2", "--out", "o", "--", *TINY, "--epochs", "1000000"]
    process = start(tmp_path, "compare", *flags, "--log-interval", "5", stdout=-1, stderr=-1)
    runs = [tmp_path / "o/runs/fp32-1111", tmp_path / "o/runs/amp-bf16-1111"]
    try:
        while any(not (run / "epochs.jsonl").exists() or not (run / "epochs.jsonl").read_text() for run in runs):
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        with pytest.raises(UsageError, match="in use"):
            comparison_folder(tmp_path / "o", json.loads((tmp_path / "o/compare.json").read_text())).__enter__()
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.terminate()
    assert (process.returncode, out) == (130, b"| 2 runs in o\n")
    assert err == b"interrupted; the same command with --out o continues\n"
    assert [json.loads((run / "result.json").read_text())["status"] for run in runs] == ["interrupted"] * 2
    with comparison_folder(tmp_path / "o", json.loads((tmp_path / "o/compare.json").read_text())):
        pass  # the trainers had the lock too


@pytest.mark.slow
def test_every_default_mode_on_the_built_in_corpus(programs) -> None:
    """End to end."""
    tiny = ["--data", "python-docs", "--emsize", "8", "--nhid", "8", "--max-steps", "4", "--batch_size", "8"]
    done = programs.run("compare", "--jobs", "2", "--out", "o", "--", *tiny, "--bptt", "10")
    assert (done.code, done.err) == (0, "")
    summary = json.loads((programs.folder / "o/summary.json").read_text())
    assert [mode["label"] for mode in summary["modes"]] == list(DEFAULT_MODES)
    assert {mode["status"] for mode in summary["modes"]} == {"finished"}
    equal = {(pair["first"], pair["second"]): pair["equal"] for pair in summary["pairs"]}
    assert equal[("manual", "fp16-optimizer")] is True
    assert all(f"| {label} " in done.out for label in DEFAULT_MODES)
    assert {path.name for path in (programs.folder / "o").iterdir()} == REPORT | {"compare.json", "runs"}


def deviating(job: Training) -> float:
    """The losses of a run: amp-bf16 is equivalent to fp32, and manual takes more than 5 seeds."""
    noise = {"fp32": 0.0, "amp-bf16": 1e-4, "manual": 0.01}[job.label]
    return 5 + noise * (1 if job.seed % 2 else -1)


LATER = ("3 seeds leave undecided: manual", "5 seeds leave undecided: manual")
AUTO = {
    "decided at once": (["fp32,amp-bf16", "auto"], 3, [], {"amp-bf16": "equivalent"}),
    "decided later": (
        ["fp32,amp-bf16,manual", "auto:8", "--margin", "0.015"], 8,
        [f"{LATER[0]}; 5 seeds are next", f"{LATER[1]}; 8 seeds are next"],
        {"amp-bf16": "equivalent", "manual": "equivalent"},
    ),
    "never": (
        ["fp32,manual", "auto:5", "--expect-equivalent", "fp32,manual"], 5,
        [f"{LATER[0]}; 5 seeds are next", f"{LATER[1]}; no more were asked for"],
        {"manual": "undecided"},
    ),
    "as many as asked for": (["fp32,manual", "4"], 4, [], {"manual": "undecided"}),
}  # fmt: skip


@pytest.mark.parametrize("case", AUTO)
def test_seeds_are_added_until_every_mode_is_decided(programs, monkeypatch, case: str) -> None:
    (modes, seeds, *flags), count, said, expected = AUTO[case]

    def run(jobs, environments, lock) -> list[Failure]:
        for job in jobs:
            make_run(job.run_dir, job.label, job.seed, ending(deviating(job)), deviating(job))
        return []

    written = []
    monkeypatch.setattr(compare, "run_jobs", run)
    monkeypatch.setattr("roundoff.report.compare_command.write_files", lambda folder, found: written.append(found))
    done = programs.run("compare", "--modes", modes, "--seeds", seeds, *flags, *TRAIN)
    assert done.code == ("--expect-equivalent" in flags)
    assert [line[2:] for line in done.out.splitlines() if "leave undecided" in line] == said
    (found,) = written
    assert {mode.label: mode.verdict.word for mode in found.modes[1:]} == expected
    assert [run.seed for run in found.modes[0].runs] == [1111 + i for i in range(count)]
    assert len(list((programs.folder / "o/runs").iterdir())) == count * len(found.modes)
    if flags == ["--expect-equivalent", "fp32,manual"]:
        assert re.match(
            r"error: --expect-equivalent fp32,manual: with fp32 as the reference, manual is shown neither to differ "
            r"from the reference nor to equal it within 0.01 nats; .* it takes about \d+ seeds to show equivalence",
            done.err,
        )


def test_modes_have_short_names_in_every_option() -> None:
    args = compare.parse_args(["--modes", "fp32,bf16", "--reference", "bf16", "--expect-equal", "fp16,bf16"])
    assert compare.parse_args(["--expect-equivalent", "fp32,bf16"]).expect_equivalent == [("fp32", "amp-bf16")]
    assert (args.modes, args.reference) == (["fp32", "amp-bf16"], "amp-bf16")
    assert args.expect_equal == [("amp-fp16", "amp-bf16")]
    assert compare.parse_args(["run", "--reference", "bf16"]).reference == "bf16", "a run may be called so"
