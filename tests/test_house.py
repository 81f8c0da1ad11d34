"""The house: arrows between packages point down, and the three trainers differ in their precision alone.

These tests and no others read source text.
"""

import ast
import re
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["main.py", "main_fp16_optimizer.py", "main_amp.py"]
FENCE = re.compile(r"\n# --- precision -+\n.*\n# -{20,}\n", re.DOTALL)

FLOORS = {
    "apex_compat": 1,
    "roundoff": 2,
    "roundoff.runs": 3,
    "roundoff.gradients": 4,
    "roundoff.verdict": 4,
    "roundoff.report": 5,
    "roundoff.library": 6,
    "roundoff.__main__": 6,
    "lm.data": 4,
    "lm.model": 4,
    "lm.options": 5,
    "lm.training": 6,
    "lm.launch": 7,
    "lm.extras": 7,
}
"""Package or module -> floor. Scripts at the top of the repository stand above all."""

LAZY = {"apex_compat", "lm", "roundoff"}
"""Packages whose `__init__` imports a name when somebody asks for it. It is a front door and stands on no floor."""


def modules() -> dict[str, Path]:
    """Every module of the packages, by its dotted name."""
    paths = [p for package in ("apex_compat", "roundoff", "lm") for p in (ROOT / package).rglob("*.py")]
    found = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}
    return {name: path for name, path in found.items() if name not in LAZY}


def imported(path: Path) -> set[str]:
    """The dotted names that a file imports anywhere, a name out of a module as `module.name`."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def arrows() -> dict[str, set[str]]:
    """Module -> the modules of this project that it imports."""
    known = modules()
    return {
        name: {
            next(m for m in (target, target.rpartition(".")[0]) if m in known)
            for target in imported(path)
            if target in known or target.rpartition(".")[0] in known
        }
        for name, path in known.items()
    }


def floor(module: str) -> int:
    return max((len(name), floor) for name, floor in FLOORS.items() if f"{module}.".startswith(f"{name}."))[1]


def test_arrows_point_down() -> None:
    up = [f"{a} -> {b}" for a, targets in arrows().items() for b in targets if floor(b) > floor(a)]
    assert up == []


def test_there_is_no_circle() -> None:
    order = list(TopologicalSorter(arrows()).static_order())  # CycleError names the circle
    assert len(order) == len(modules())


@pytest.mark.parametrize(
    ("package", "strangers"), [("apex_compat", {"roundoff", "lm"}), ("roundoff", {"lm"}), ("lm", set())]
)
def test_a_package_knows_none_above_it(package, strangers) -> None:
    scripts = {path.stem for path in ROOT.glob("*.py")} | {"tests", "benchmarks", "examples"}
    for path in (ROOT / package).rglob("*.py"):
        tops = {name.partition(".")[0] for name in imported(path)}
        assert not tops & (strangers | scripts), path


def test_apex_compat_imports_torch_alone() -> None:
    allowed = set(sys.stdlib_module_names) | {"torch", "apex_compat"}
    for path in (ROOT / "apex_compat").rglob("*.py"):
        assert {name.partition(".")[0] for name in imported(path)} <= allowed, path


def skeleton(source: str) -> str:
    """The source without its title line, its imports and its precision block."""
    title, _, rest = source.partition("\n")
    assert title.startswith('"""')
    rest, fences = FENCE.subn("", rest)
    assert fences == 1
    return re.sub(r"^(import|from) .*\n", "", rest, flags=re.MULTILINE)


def test_the_scripts_are_one_program_outside_the_fence() -> None:
    assert len({skeleton((ROOT / name).read_text(encoding="utf-8")) for name in SCRIPTS}) == 1
