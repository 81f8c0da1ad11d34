"""Set-up shared by all tests."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import fuzzing
import jobs
import ranks as several
from lm.model.model_file import save_model
from programs import WORDS, Programs, make_model, write_corpus
from runs import Command, Expected, Faulty
from switches import CUBLAS, switches_kept

# The suite runs one process a core; more threads than cores only get in each other's way.
torch.set_num_threads(1)

# Where there is no GPU torch keeps each seed for one, with the call stack as text: a tenth of the time of short tests.
if not torch.cuda.is_available():
    for kind in (torch.cuda, torch.xpu, torch.mtia):
        kind.manual_seed_all = lambda seed: None

# Sacred gives the root logger a handler if it has none, and that one would write to the standard error of one test.
logging.getLogger().addHandler(logging.NullHandler())

# torch reads it at the first product of a process on a GPU, and never again: a test with --deterministic comes later.
os.environ.setdefault(CUBLAS, ":16:8")


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add --slow."""
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_configure(config: pytest.Config) -> None:
    """Let the tests that change files at random, which are imported later, try all of their examples with --slow."""
    if config.getoption("--slow"):
        fuzzing.share = 1


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none, and what is slow, on a CPU, where nobody asked for it."""
    for item in items:
        if item.get_closest_marker("cuda"):
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA GPU on this machine"))
        elif item.get_closest_marker("slow") and not config.getoption("--slow"):
            item.add_marker(pytest.mark.skip(reason="slow: make test-all runs it"))


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """No test finds torch as another one has set it."""
    with switches_kept():
        yield


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a check runs on."""
    return str(request.param)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small corpus of random words."""
    return jobs.write_corpus(tmp_path / "corpus")


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Programs]:
    """The trainers and generate.py, in a folder of their own with a small corpus."""
    programs = Programs(tmp_path, monkeypatch, capsys)
    yield programs
    for hook in programs.hooks:
        hook.remove()


@pytest.fixture
def saved(programs: Programs) -> Programs:
    """Programs, with a model in model.safetensors."""
    save_model(programs.folder / "model.safetensors", make_model(), WORDS)
    return programs


@pytest.fixture(scope="session")
def all_ranks() -> Iterator[several.Ranks]:
    """The process that distributed runs are forked from."""
    ranks = several.Ranks()
    yield ranks
    ranks.close()


@pytest.fixture
def ranks(all_ranks: several.Ranks, tmp_path: Path) -> several.Ranks:
    """The trainers in several processes, in a folder of their own with a small corpus."""
    all_ranks.folder = tmp_path
    if not (tmp_path / "corpus").exists():
        write_corpus(tmp_path / "corpus")
    return all_ranks


@pytest.fixture(scope="session")
def undisturbed() -> dict[Command, Expected]:
    """What the runs left that nobody disturbed, each of which is needed once."""
    return {}


@pytest.fixture
def faulty(ranks: several.Ranks, undisturbed: dict[Command, Expected]) -> Faulty:
    """Runs to disturb."""
    return Faulty(ranks, undisturbed)
