"""Set-up shared by all tests."""

from pathlib import Path

import pytest
import torch

import jobs

# The suite runs one process a core; more threads than cores only get in each other's way.
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="torch finds no CUDA GPU on this machine"))


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
def device(request: pytest.FixtureRequest) -> str:
    """Each device that a check runs on."""
    return str(request.param)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """A small corpus of random words."""
    return jobs.write_corpus(tmp_path / "corpus")
