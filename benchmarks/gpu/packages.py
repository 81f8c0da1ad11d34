"""The packages that a part needs beyond torch and numpy, and how they get to a machine without a network."""

import importlib
import os
import re
import tomllib
from importlib import metadata
from pathlib import Path

from roundoff.errors import RunError

ROOT = Path(__file__).resolve().parent.parent.parent


def python_path() -> str:
    """Return PYTHONPATH with this project before what it says already, such as a folder of packages."""
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])


BASE = ("safetensors", "tqdm", "filelock")
"""What the trainers need beside torch and numpy."""
MODULES = {"pytest-xdist": "xdist"}
"""Package -> its module, where that has another name."""


def bounds() -> dict[str, str]:
    """Return the lowest version of each package of the base install, as pyproject.toml has it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    found = (re.fullmatch(r"([\w-]+)>=([\d.]+)", line) for line in project["dependencies"])
    return {match[1]: match[2] for match in found if match}


def version(package: str) -> str | None:
    """Return the version of an installed package; None where it cannot be imported."""
    try:
        importlib.import_module(MODULES.get(package, package))
        return metadata.version(package)
    except ImportError:  # PackageNotFoundError is one
        return None


def missing(packages: tuple[str, ...]) -> list[str]:
    """Return those of `packages` that are not there, or too old, as pip takes them."""
    lowest = bounds()
    wanted = []
    for package in packages:
        found, bound = version(package), lowest.get(package, "0")
        if found is None or _numbers(found) < _numbers(bound):
            wanted.append(f"{package}>={bound}" if package in lowest else package)
    return wanted


def require(packages: tuple[str, ...]) -> None:
    """Raise RunError, which says how to get them, unless all `packages` are there."""
    if wanted := missing(packages):
        raise RunError(
            f"it needs {' and '.join(wanted)}; bring the wheels in a folder WHEELS, then run: python -m pip install "
            f"--no-index --no-deps --find-links WHEELS {' '.join(repr(name) for name in wanted)}"
        )


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])
