"""What a user has who installs the wheel: its files, and what works with its base dependencies alone.

The base is a folder that holds the wheel's files, the packages that the wheel requires, and what these require.
Python starts without its own site-packages, so nothing else can be imported, whatever is installed beside.
"""

import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import roundoff
from programs import PROBE, ROOT, SCRIPTS, SMALL, TINY, Done, read_run, write_corpus
from synthetic import make_run

PACKAGES = ("apex_compat", "lm", "roundoff")
NEEDED = Version("77")  # of setuptools, in pyproject.toml


def setuptools_is_too_old() -> str:
    """Return why no wheel can be built here, or nothing."""
    try:
        version = importlib.metadata.version("setuptools")
    except importlib.metadata.PackageNotFoundError:
        return "setuptools, which builds the wheel, is not installed"
    return "" if Version(version) >= NEEDED else f"setuptools {version} builds no such wheel, {NEEDED} does"


pytestmark = pytest.mark.skipif(bool(setuptools_is_too_old()), reason=setuptools_is_too_old())


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.Path:
    """The wheel, built without a network from a copy of the sources."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("built")
    cache = shutil.ignore_patterns("__pycache__")
    for path in (*PACKAGES, "tests", "benchmarks", "examples", "data"):
        shutil.copytree(ROOT / path, source / path, ignore=cache)
    for file in (*ROOT.glob("*.py"), *map(ROOT.joinpath, ("pyproject.toml", "README.md", "LICENSE"))):
        shutil.copy(file, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(built)!r})"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (path,) = built.iterdir()
    return zipfile.Path(path)


@pytest.fixture(scope="module")
def about(wheel: zipfile.Path) -> importlib.metadata.Distribution:
    """The metadata of the wheel."""
    return importlib.metadata.PathDistribution(wheel / f"roundoff-{roundoff.__version__}.dist-info")


@pytest.fixture(scope="module")
def base(wheel: zipfile.Path, about: importlib.metadata.Distribution, tmp_path_factory) -> Path:
    """A folder with all that `pip install roundoff` brings."""
    folder = tmp_path_factory.mktemp("base")
    wheel.root.extractall(folder)
    names = required(about)
    for name in names:  # grows as it goes
        distribution = importlib.metadata.distribution(name)
        names += [new for new in required(distribution) if new not in names]
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(Path(str(distribution.locate_file(top))))
    return folder


def required(distribution: importlib.metadata.Distribution) -> list[str]:
    """Return what `distribution` needs on this machine, without its extras."""
    requirements = map(Requirement, distribution.requires or ())
    return [r.name for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A working directory with a small corpus, and the scripts as a user downloads them."""
    path = tmp_path_factory.mktemp("work")
    write_corpus(path / "corpus", train=20)
    for script in ROOT.glob("*.py"):
        shutil.copy(script, path)
    return path


def python(base: Path, folder: Path, code: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in `folder` with the base alone."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(base)}
    command = [sys.executable, "-S", "-W", "error", "-c", textwrap.dedent(code), *words]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


RUN_ALL = """
    import contextlib, io, json, runpy, sys
    done = []
    for script, *words in json.loads(sys.argv[1]):
        sys.argv, out, err = [script, *words], io.StringIO(), io.StringIO()
        try:
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
                runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            done.append([end.code, out.getvalue(), err.getvalue()])
    print(json.dumps(done))
"""


def run_all(base: Path, folder: Path, commands: list[list[str]], before: str = "") -> list[Done]:
    """Run scripts with their words as a user does, but all in one process, which first runs the line `before`."""
    done = python(base, folder, f"{before}\n{textwrap.dedent(RUN_ALL)}", json.dumps(commands))
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return [Done(*each) for each in json.loads(done.stdout)]


def test_the_wheel_has_the_three_packages_and_nothing_else(wheel):
    sources = {
        str(path.relative_to(ROOT))
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.suffix == ".py" or path.name == "py.typed"
    }
    metadata = f"roundoff-{roundoff.__version__}.dist-info"
    files = {name for name in wheel.root.namelist() if not name.endswith("/")}
    assert {name for name in files if not name.startswith(metadata)} == sources
    assert {f"{metadata}/METADATA", f"{metadata}/entry_points.txt", f"{metadata}/licenses/LICENSE"} <= files


def test_the_metadata_say_what_the_base_needs_and_what_each_extra_brings(about):
    requirements = [Requirement(line) for line in about.requires]
    assert about.metadata["Name"] == "roundoff"
    assert about.version == roundoff.__version__
    assert sorted(r.name for r in requirements if r.marker is None) == [
        "filelock",
        "numpy",
        "safetensors",
        "torch",
        "tqdm",
    ]
    extras = {
        extra: {r.name for r in requirements if r.marker is not None and r.marker.evaluate({"extra": extra})}
        for extra in about.metadata.get_all("Provides-Extra")
    }
    assert extras.keys() == {"report", "sacred", "tensorboard", "onnx", "completion", "docs", "frameworks", "dev"}
    assert extras["report"] == {"matplotlib", "plotly", "scipy", "tabulate"}
    (own,) = (r for r in requirements if r.name == "roundoff")
    assert own.extras == extras.keys() - {"dev", "frameworks"}
    assert extras["dev"] > {"roundoff", "mypy", "pytest", "ruff"}
    assert [(e.group, e.name) for e in about.entry_points] == [("console_scripts", "roundoff")]


def test_the_base_holds_what_was_installed_and_no_extra(base):
    tops = {path.name for path in base.iterdir()}
    assert {*PACKAGES, "torch", "numpy", "safetensors", "tqdm"} <= tops
    extras = {
        "matplotlib",
        "plotly",
        "scipy",
        "tabulate",
        "sacred",
        "tensorboard",
        "onnx",
        "onnxruntime",
        "argcomplete",
    }
    assert not tops & (extras | {"selenium", "hypothesis", "pytest", "packaging", "main.py", "compare.py", "tests"})


def test_every_trainer_trains_with_the_base_alone(base, folder):
    flags = [*TINY[:-4], "--epochs", "1"]
    commands = [[f"{script}.py", *flags, "--run-dir", script, "--save", f"{script}.model"] for script in SCRIPTS]
    assert [(done.code, done.err) for done in run_all(base, folder, commands)] == [(0, "")] * 3
    for script in SCRIPTS:
        run = read_run(folder / script)
        assert (run.result["status"], len(run.steps), len(run.epochs)) == ("finished", 9, 1)


def test_the_library_works_with_the_base_alone(base, folder):
    code = """
        import apex_compat
        from apex_compat.fp16_utils import FP16_Optimizer
        import roundoff, torch
        from roundoff import Autocast, MasterWeights, RunDirectory, StepResult, WrappedOptimizer, read_run
        for package in (apex_compat, roundoff):
            assert package.__file__.startswith(sys.argv[1]), package.__file__
        torch.manual_seed(0)
        made = {
            "masters": lambda sgd: MasterWeights(sgd.param_groups[0]["params"], sgd),
            "wrapped": lambda sgd: WrappedOptimizer(FP16_Optimizer(sgd, static_loss_scale=128.0)),
            "autocast": lambda sgd: Autocast(sgd, torch.amp.GradScaler("cpu"), "cpu", torch.bfloat16),
        }
        for name, make in made.items():
            model = torch.nn.Linear(3, 2)
            model = model.half() if name == "wrapped" else model
            before = model.weight.detach().clone()
            precision = make(torch.optim.SGD(model.parameters(), lr=0.1))
            with precision.forward():
                loss = model(torch.ones(4, 3, dtype=model.weight.dtype)).float().square().mean()
            precision.backward(loss)
            assert precision.step(1.0).applied
            assert not torch.equal(model.weight, before)
        print("trained", *made)
    """
    done = python(base, folder, "import sys\n" + textwrap.dedent(code), str(base))
    assert (done.returncode, done.stdout, done.stderr) == (0, "trained masters wrapped autocast\n", ""), done.stderr


@pytest.mark.slow
def test_a_trainer_needs_neither_fcntl_nor_resource(base, folder):
    """Windows has neither module. There filelock uses another one, and does not warn as it does on a Unix without."""
    hide = "import sys, warnings; sys.modules |= {'fcntl': None, 'resource': None}"
    quiet = "warnings.filterwarnings('ignore', 'only soft file lock is available')"
    command = ["main.py", *TINY[:-2], "--run-dir", "elsewhere", "--save", "elsewhere.model"]
    (done,) = run_all(base, folder, [command], f"{hide}; {quiet}")
    assert (done.code, done.err) == (0, "")
    assert read_run(folder / "elsewhere").result["status"] == "finished"


def test_what_needs_an_extra_names_it_before_anything_is_done(base, folder, about):
    """The run directories are there; so is the console script, as pip writes it."""
    (entry,) = about.entry_points
    start = f"import sys\nfrom {entry.module} import {entry.attr}\nsys.exit({entry.attr}())\n"
    (folder / "roundoff-script").write_text(start)
    for name in ("main", "main_amp"):
        make_run(folder / "runs" / name)
    runs = ["runs/main", "runs/main_amp"]
    before = sorted(folder.rglob("*"))
    commands = [
        ["compare.py", "--", *TINY[:-2]],
        ["compare.py", *runs],
        ["probe.py", *PROBE, "--batches", "1000", "--", *SMALL],  # a mistake that measuring would find
        ["roundoff-script", "compare", *runs],
    ]
    for command, done in zip(commands, run_all(base, folder, commands), strict=True):
        assert (done.code, done.out) == (2, ""), command
        assert re.fullmatch(r"error: [^\n]*pip install 'roundoff\[report\]'[^\n]*\n", done.err), command
    assert sorted(folder.rglob("*")) == before
