"""docs/your-model.md runs as it stands: each part is a script, whose warnings are errors."""

import json
import os
import re
import shlex
import subprocess
import sys
import textwrap
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest

from programs import ROOT
from roundoff import read_run

PAGE = (ROOT / "docs" / "your-model.md").read_text(encoding="utf-8")
DEPRECATED = "ignore:`isinstance(treespec:FutureWarning"  # Lightning 2.6 asks torch 2.13 so
STEPS = 20


def blocks(text: str, language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [code for name, code in found if name == language]


START, *SECTIONS = re.split(r"^## ", PAGE, flags=re.MULTILINE)
PARTS = {part.partition("\n")[0]: part for part in SECTIONS}


def python(folder: Path, *words: str) -> str:
    """Run Python in `folder`, and return what it prints."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-W", "error", "-W", DEPRECATED, *words]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, encoding="utf-8", timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def run(part: str, folder: Path, *changes: tuple[str, str], before: str = "", after: str = "") -> str:
    """Run a part of the page, its commands too, in `folder`; return what it prints."""
    code = before + "".join(blocks(START, "python") + blocks(PARTS[part], "python")) + after
    for old, new in changes:
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    (folder / "script.py").write_text(code, encoding="utf-8")
    printed = python(folder, "script.py")
    for line in "".join(blocks(PARTS[part], "")).splitlines():
        _, *words = shlex.split(line)
        printed += python(folder, "-m", "roundoff", *words)
    return printed


TRACKERS = {
    "wandb": """
        class Summary:
            def update(self, d):
                say("summary", d)

        class Run:
            summary = Summary()

            def log(self, data, step=None, commit=None):
                say("log", data, step)

            def finish(self, exit_code=None, quiet=None):
                say("finish", exit_code)

        def init(entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None):
            say("init", project, name, config)
            return Run()
    """,
    "mlflow": """
        def start_run(run_id=None, experiment_id=None, run_name=None, nested=False):
            say("start_run", run_name)

        def log_params(params, synchronous=None, run_id=None):
            say("log_params", params)

        def log_metrics(metrics, step=None, synchronous=None, run_id=None):
            say("log", {name: float(value) for name, value in metrics.items()}, step)

        def end_run(status="FINISHED"):
            say("end_run", status)
    """,
}
"""In place of packages that take hundreds of megabytes: their calls with their arguments, which go into a file."""
SAY = """
import json

def say(*what):
    with open(__name__ + ".jsonl", "a") as file:
        print(json.dumps(what), file=file)
"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("plain")
    for name, code in TRACKERS.items():
        (folder / f"{name}.py").write_text(SAY + textwrap.dedent(code), encoding="utf-8")
    return folder, run("A plain PyTorch loop", folder)


PACKAGES = {"Hugging Face Trainer": ["transformers", "accelerate"]}


def needs(*packages: str) -> None:
    """Skip the test where the extra `frameworks` is not installed; without an import, which takes seconds."""
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"this environment lacks {package}, of the extra frameworks: make test-all installs it")


def test_every_part_is_run() -> None:
    with_code = {name for name, part in PARTS.items() if "```" in part}
    assert with_code == {"A plain PyTorch loop", "What a probe takes", *FRAMEWORKS}


def test_users_write_at_most_twenty_lines() -> None:
    for name in FRAMEWORKS:
        first = blocks(PARTS[name], "python")[0]
        assert len([line for line in first.splitlines() if line.strip()]) <= 20, name


def test_a_plain_loop(plain) -> None:
    folder, printed = plain
    assert {path.name for path in (folder / "probe").iterdir()} == {"probe.json", "probe.html", "probe.png"}
    bf16, fp16 = (read_run(folder / "runs" / name) for name in ("bf16-1", "fp16-1"))
    for recorded in (bf16, fp16):
        assert recorded.result["status"] == "finished"
        assert len(recorded.steps["loss"]) == STEPS
        assert recorded.steps["loss"][-1] < recorded.steps["loss"][0]
        assert all(norm > 0 for norm in recorded.steps["grad_norm"])
    assert set(fp16.steps["loss_scale"]) == {65536.0}
    for mode in ("masters-fp16", "amp-bf16", "bf16", "fp16"):
        assert re.search(rf"^{mode} .*\d", printed, re.MULTILINE), mode


def test_trackers_hear_what_the_record_says(plain) -> None:
    folder, _ = plain
    record = read_run(folder / "runs" / "heard-1")
    (row,) = record.epochs
    lines = {name: (folder / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() for name in TRACKERS}
    heard = {name: [json.loads(line) for line in lines[name]] for name in TRACKERS}
    for said in heard.values():
        *intervals, epoch = [(data, step) for call, *rest in said if call == "log" for data, step in [rest]]
        assert [step for _, step in intervals] == [5, 10, 15, 16]
        ends = [0, *(step for _, step in intervals)]
        means = [fmean(record.steps["loss"][first:end]) for first, end in pairwise(ends)]
        assert [data["train/loss"] for data, _ in intervals] == pytest.approx(means)
        assert epoch == ({"valid/loss": row["valid_loss"]}, 16)
    result = json.loads((folder / "runs/heard-1/result.json").read_text(encoding="utf-8"))
    call, project, name, config = heard["wandb"][0]
    assert (call, project, name) == ("init", "mlp", "heard-1")
    assert (config["job"], config["precision"], config["seed"]) == (record.job, {"mode": "fp32"}, 1)
    assert heard["wandb"][-2:] == [["summary", result], ["finish", 0]]
    assert heard["mlflow"][:2] == [["start_run", "heard-1"], ["log_params", {"model": "mlp", "lr": 0.1, "seed": 1}]]
    assert heard["mlflow"][-1] == ["end_run", "FINISHED"]


def test_what_a_probe_takes(tmp_path) -> None:
    needs("transformers")
    printed = run("What a probe takes", tmp_path)
    assert re.search(r"log-probability +\S*\d", printed)
    assert [line for line in printed.splitlines() if "parameters; 8 batches" in line] == [
        "Classifier of 676 parameters; 8 batches.",
        "Tagger of 6,532 parameters; 8 batches.",
        "GPT2LMHeadModel of 28,032 parameters; 8 batches.",
    ]


HOOK = "next(model.parameters()).register_hook(overflow)"
SCALER = "torch.amp.GradScaler('cpu')"  # the frameworks make one for fp16, and take fp16 on a GPU only
FP16 = f"accelerator.scaler, accelerator.state._mixed_precision = {SCALER}, 'fp16'"
FRAMEWORKS = {
    "Hugging Face Trainer": [
        (
            "    trainer.train()",
            f"    model, accelerator = trainer.model, trainer.accelerator; {HOOK}; {FP16}; trainer.train()",
        )
    ],
    "Lightning": [
        ("model = Classifier()", f"model = Classifier(); {HOOK}"),
        (
            'precision="bf16-mixed"',
            f'plugins=L.pytorch.plugins.MixedPrecision("16-mixed", "cpu", {SCALER})',
        ),
    ],
    "Accelerate": [
        ("model = Classifier()", f"model = Classifier(); {HOOK}"),
        ("optimizer = torch", f"{FP16}; optimizer = torch"),
    ],
}
OVERFLOW = """calls = []


def overflow(gradient):
    calls.append(1)
    return gradient * float("inf") if len(calls) == 3 else gradient


"""


@pytest.mark.parametrize("name", ["Lightning", "Accelerate"])
def test_the_same_job_has_the_same_record(name, plain, tmp_path) -> None:
    needs(name.lower())
    run(name, tmp_path)
    expected, found = read_run(plain[0] / "runs" / "bf16-1"), read_run(tmp_path / "runs" / name.lower())
    for column in ("step", "loss", "grad_norm", "loss_scale", "applied"):
        assert found.steps[column] == expected.steps[column]
    assert set(found.steps["lr"]) == {0.1}
    assert found.config["job"] == expected.config["job"]
    assert found.result["status"] == "finished"


def test_a_trainer_has_the_record_of_its_log(tmp_path) -> None:
    needs("transformers", "accelerate")
    printed = run("Hugging Face Trainer", tmp_path, after="import json\nprint(json.dumps(trainer.state.log_history))\n")
    logged = json.loads(printed.splitlines()[-1])
    steps = [row for row in logged if "loss" in row]
    found = read_run(tmp_path / "runs" / "trainer")
    assert len(steps) == 16
    for column, name in {"loss": "loss", "grad_norm": "grad_norm", "lr": "learning_rate"}.items():
        assert found.steps[column] == pytest.approx([row[name] for row in steps], rel=1e-6)
    assert [row["valid_loss"] for row in found.epochs] == [row["eval_loss"] for row in logged if "eval_loss" in row]
    assert found.steps["epoch"] == [1] * 8 + [2] * 8


@pytest.mark.parametrize("name", FRAMEWORKS)
def test_a_step_that_is_skipped_is_recorded_with_its_scale(name, tmp_path) -> None:
    """The third step overflows."""
    needs(*PACKAGES.get(name, [name.lower()]))
    run(name, tmp_path, *FRAMEWORKS[name], before=OVERFLOW)
    steps = read_run(tmp_path / "runs" / name.split()[-1].lower()).steps
    after = len(steps["step"]) - 3
    assert steps["applied"] == [True, True, False] + [True] * after
    assert steps["loss_scale"] == [2.0**16] * 3 + [2.0**15] * after
    assert [norm < 10 for norm in steps["grad_norm"]] == steps["applied"]
