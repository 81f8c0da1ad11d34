"""`python -m benchmarks gpu`, on a CPU: each part, what it finds, and what becomes of a part that cannot run."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from benchmarks.gpu import bits, command, commands, packages, speed, suite
from benchmarks.gpu.command import PARTS, Part
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.trainers import Run, Trainers
from roundoff.program import exit_code

ROOT = Path(__file__).parent.parent


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A CPU and a small corpus."""
    for name in ("PYTHONPATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "KINETO_LOG_LEVEL"):
        monkeypatch.setenv(name, "")  # so that what a part sets is gone after the test
        monkeypatch.delenv(name)
    (tmp_path / "scratch").mkdir()
    data = jobs.write_corpus(tmp_path / "corpus", lines=100)
    return Settings(tmp_path, "cpu", str(data), tmp_path / "scratch")


def content_of(settings: Settings, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((settings.out / f"{name}.json").read_text())
    return content


def run(settings: Settings, name: str) -> dict[str, Any]:
    """Run a part in this process; return its report, which must say that all is well."""
    command.run_here(name, PARTS[name], settings.out / f"{name}.json", settings)
    content = content_of(settings, name)
    assert content["error"] is None, content["tracebacks"]
    assert (content["part"], content["device"]) == (name, "cpu")
    for check in content["checks"]:
        assert check.keys() >= {"name", "found", "expected", "as_expected"}
        assert check["as_expected"], check
    return content


def test_facts(settings, capsys) -> None:
    content = run(settings, "facts")
    facts = {figure["name"]: figure["value"] for figure in content["figures"] if "value" in figure}
    assert facts.keys() >= {"torch", "cuda", "cudnn", "driver", "device", "packages"}
    found = {check["name"]: check["found"] for check in content["checks"]}
    for kind in ("LSTM", "GRU", "RNN"):
        for half in ("bfloat16", "float16"):
            assert found[f"this project's {kind} under autocast in {half} returns"] == half
    assert sum("is put back" in name for name in found) == 4
    assert sum("product" in name for name in found) == 4
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(content["checks"]) + len(content["figures"])
    assert all(line.startswith("facts    | ") for line in lines)


def test_a_doubt_that_is_right_and_one_that_is_not(settings, capsys) -> None:
    report = Report(settings.out / "x.json", "x", "cuda")
    means = ("the doubt is right", "the doubt is wrong")
    for found in ("float16", "bfloat16"):
        report.check("torch's layer", found, "float16", means=means)
    report.check("ours", "float16", "bfloat16", required=True)
    report.end()
    assert capsys.readouterr().out.splitlines() == [
        "x        | as expected | torch's layer: float16 (expected: float16) -> the doubt is right",
        "x        | unexpected  | torch's layer: bfloat16 (expected: float16) -> the doubt is wrong",
        "x        | WRONG       | ours: float16 (expected: bfloat16)",
    ]
    content = content_of(settings, "x")
    assert [check["as_expected"] for check in content["checks"]] == [True, False, False]
    assert content["error"] == "ours: float16"
    assert len(command.lessons(content)) == 3


@pytest.mark.slow
def test_tests(settings) -> None:
    (counts,) = run(settings, "tests")["figures"]
    assert counts["passed"] > 5
    assert counts["failed"] == 0


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.test_a" name="test_good" time="1.5"/>
<testcase classname="tests.test_a" name="test_bad"><failure message="m">def test_bad():
&gt;   assert one == two
E   AssertionError: assert 1 == 2

tests/test_a.py:3: AssertionError</failure></testcase>
<testcase classname="tests.test_a" name="test_not"><skipped message="slow"/></testcase>
<testcase classname="" name="tests.test_pages"><error message="collection failure">ImportError while importing
E   ModuleNotFoundError: No module named 'selenium'</error></testcase>
</testsuite></testsuites>"""


def test_failures_and_files_that_need_a_package_are_told_apart(settings) -> None:
    (settings.scratch / "tests.xml").write_text(JUNIT)
    report = Report(settings.out / "tests.json", "tests", "cuda")
    suite.record(report, settings.scratch / "tests.xml", "pytest")
    report.end()
    content = content_of(settings, "tests")
    counts = content["figures"][0]
    assert (counts["passed"], counts["failed"], counts["skipped"]) == (1, 1, 1)
    assert counts["not_read"] == {"tests.test_pages": "selenium"}
    assert content["error"] == "tests.test_a::test_bad: AssertionError: assert 1 == 2"


@pytest.mark.slow
def test_speed(settings) -> None:
    content = run(settings, "speed")
    figures = {figure["name"]: figure for figure in content["figures"] if "step_ms" in figure}
    assert list(figures) == ["reference", *speed.MODES]
    for figure in figures.values():
        assert 0 < figure["step_ms"]["median"] < 5000
        assert figure["launch_ms"] > 0
        assert figure["evaluation_ms_a_batch"]["median"] > 0
        assert figure["kernels"] > 50
        assert figure["kernel_ms"] > 0
        assert 0 < len(figure["top"]) <= 5
    assert len([figure for figure in content["figures"] if "ratio" in figure]) == len(speed.MODES)


def test_kernels_are_counted_without_what_annotates_them() -> None:
    kinds = [("kernel", "gemm", 30.0), ("kernel", "gemm", 30.0), ("gpu_memset", "Memset", 2.0), ("kernel", "copy", 8.0)]
    others = [("gpu_user_annotation", "Optimizer.step", 99.0), ("cuda_runtime", "cudaLaunchKernel", 5.0)]
    events = [{"ph": "X", "cat": cat, "name": name, "dur": dur} for cat, name, dur in kinds + others]
    found = speed.count([*events, {"ph": "M", "name": "process_name"}], 2, speed.ON_A_GPU)
    assert (found["kernels"], found["kernel_ms"]) == (2.0, 0.035)
    assert found["top"][0] == {"name": "gemm", "ms_a_step": 0.03, "a_step": 1.0}
    assert speed.count([], 2, speed.ON_A_GPU)["kernels"] is None


@pytest.mark.slow
def test_commands(settings) -> None:
    content = run(settings, "commands")
    assert len(content["figures"]) == len(commands.ON_A_CPU)
    for figure in content["figures"]:
        assert figure["steps"] == commands.FEW_STEPS
        assert 1 < figure["test_ppl"] < 100
        assert figure["tokens_per_second"] > 0
        assert figure["dtypes"]["loss"] == "float32"


@pytest.mark.slow
def test_bits_and_resume(settings) -> None:
    names = [check["name"] for check in run(settings, "bits")["checks"]]
    assert sum("with --deterministic" in name for name in names) == 3
    assert sum("without --deterministic" in name for name in names) == 1
    (check,) = run(settings, "resume")["checks"]
    assert check["found"] == "equal"
    assert list(settings.scratch.rglob("*.safetensors")) == []


def test_a_run_that_fails_is_one_line_and_the_others_go_on(settings, monkeypatch) -> None:
    monkeypatch.setattr(commands, "ON_A_CPU", (("main.py", "--lr", "0"), ("main.py",)))
    command.run_here("commands", PARTS["commands"], settings.out / "commands.json", settings)
    content = content_of(settings, "commands")
    assert "main.py ended with exit code 2: error: argument --lr" in content["error"]
    assert "\n" not in content["error"]
    assert len(content["figures"]) == 1


def rows(folder: Path, losses: list[float]) -> Run:
    folder.mkdir()
    lines = [
        json.dumps({"step": i, "loss": loss, "grad_norm": 1.0, "applied": True}) for i, loss in enumerate(losses, 1)
    ]
    (folder / "steps.jsonl").write_text("\n".join(lines) + "\n")
    return Run(folder, "", 0.0)


def test_the_first_difference_is_named(tmp_path) -> None:
    one, same = rows(tmp_path / "one", [1.0, 2.0]), rows(tmp_path / "same", [1.0, 2.0])
    other, short = rows(tmp_path / "other", [1.0, 2.5]), rows(tmp_path / "short", [1.0])
    assert bits.first_difference(one, same, bits.FIELDS) == "equal"
    assert bits.first_difference(one, other, bits.FIELDS) == "from step 2 on another loss, 2.0 and 2.5"
    assert bits.first_difference(one, short, bits.FIELDS) == "2 steps and 1"


DYING = """
import os, signal, time
def run(report, settings):
    report.figure("first", value=1)
    {}
"""


@pytest.mark.parametrize(
    ("end", "seconds", "error"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 60, "its process ended with exit code -9"),
        pytest.param("os.system('sleep 100')", 30, "it was stopped after 30 s", marks=pytest.mark.slow),
        ("raise ValueError('one\\ntwo')", 60, "ValueError: one"),
    ],
    ids=["killed", "hangs", "raises"],
)
@pytest.mark.slow
def test_a_part_that_dies_leaves_what_it_had(settings, monkeypatch, end, seconds, error) -> None:
    (settings.scratch / "dying.py").write_text(DYING.format(end))
    monkeypatch.syspath_prepend(settings.scratch)
    start = time.monotonic()
    content = command.run_part("dying", Part("dying", seconds, (), ""), settings, start + 100)
    assert content == content_of(settings, "dying")
    assert content["error"] == error
    assert content["figures"] == [{"value": 1}]
    assert time.monotonic() - start < 60


def test_no_part_starts_after_the_time_is_up(settings) -> None:
    content = command.run_part("facts", PARTS["facts"], settings, time.monotonic() - 1)
    assert content["error"] == "no time was left for it"


BLOCK = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("safetensors", "filelock", "tqdm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
"""


def test_a_package_that_is_too_old_is_asked_for(monkeypatch) -> None:
    installed = {"safetensors": "0.8.0", "tqdm": None, "filelock": "3.9.1", "pytest": "8.0"}
    monkeypatch.setattr(packages, "version", installed.__getitem__)
    bounds = packages.bounds()
    assert bounds.keys() >= set(packages.BASE)
    wanted = [f"{name}>={bounds[name]}" for name in ("tqdm", "filelock")]
    assert packages.missing(("pytest", *packages.BASE)) == wanted


@pytest.mark.slow
def test_the_command_starts_without_the_packages_of_the_base_install(tmp_path) -> None:
    jobs.write_corpus(tmp_path / "corpus")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(BLOCK)
    environment = os.environ | {"PYTHONPATH": f"{tmp_path / 'site'}{os.pathsep}{ROOT}", "OMP_NUM_THREADS": "1"}
    flags = ["--device", "cpu", "--data", str(tmp_path / "corpus"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *flags, "--parts", "commands,facts"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads((tmp_path / "out" / "facts.json").read_text())["error"] is None
    error = json.loads((tmp_path / "out" / "commands.json").read_text())["error"]
    assert re.search(r"needs safetensors>=[\d.]+ and tqdm>=[\d.]+ and filelock>=[\d.]+;", error)
    assert "pip install --no-index --no-deps --find-links WHEELS 'safetensors>=" in error
    assert error in done.stdout


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ([], "the following arguments are required: --out"),
        (["--out", "o", "--parts", "facts,sped"], "there is no part 'sped'; choose from facts, tests, speed, "),
        (["--out", "o", "--device", "tpu"], "--device 'tpu' is no device of torch"),
        (["--out", "o", "--device", "cpu", "--data", "nowhere"], "there is no such folder"),
        (["--out", "file", "--device", "cpu"], "--out file: this is a file; give a folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, monkeypatch, capsys, flags, line) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    assert exit_code(lambda: command.main(flags)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU")
@pytest.mark.parametrize("flags", [[], ["--device", "cuda"]], ids=["default", "cuda"])
def test_without_a_gpu_the_command_names_the_way_to_try_it(tmp_path, capsys, flags) -> None:
    assert exit_code(lambda: command.main(["--out", str(tmp_path / "out"), *flags])) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device cuda: ")
    assert error.endswith("; --device cpu tries every part at a small size\n")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_where_a_forked_process_cannot_use_the_device_each_run_starts_afresh(settings, monkeypatch) -> None:
    assert Trainers(settings).method == "forkserver"
    monkeypatch.setattr("benchmarks.gpu.trainers._try", sys.exit)  # with a text, which is exit code 1
    assert Trainers(settings).method == "spawn"
