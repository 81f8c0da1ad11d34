"""The three trainers differ in their precision block and in nothing else."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPTS = ["main.py", "main_fp16_optimizer.py", "main_amp.py"]
FENCE = re.compile(r"\n    # --- precision -+\n.*\n    # -{20,}\n", re.DOTALL)


def skeleton(source: str) -> str:
    """The source without its title line, its imports and its precision block."""
    title, _, rest = source.partition("\n")
    assert title.startswith('"""')
    rest, fences = FENCE.subn("", rest)
    assert fences == 1
    return re.sub(r"^(import|from) .*\n+", "", rest, flags=re.MULTILINE)  # and the blank lines between their groups


def test_the_scripts_are_one_program_outside_the_fence() -> None:
    skeletons = {skeleton((ROOT / name).read_text()) for name in SCRIPTS}
    assert len(skeletons) == 1
    assert "return fit(args, corpus, model, precision)" in skeletons.pop()


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_is_under_50_lines(name) -> None:
    assert len((ROOT / name).read_text().splitlines()) < 50


@pytest.mark.parametrize("path", sorted(ROOT.glob("lm/**/*.py")) + sorted(ROOT.glob("fp16_utils/*.py")), ids=str)
def test_a_file_is_under_300_lines(path) -> None:
    assert len(path.read_text().splitlines()) < 300


# What each layer of the house may import; arrows point downwards only.
FORBIDDEN = {
    "fp16_utils": r"^\s*(from|import) (lm|main|generate|tests)\b",
    "lm": r"^\s*(from|import) (main|main_amp|main_fp16_optimizer|generate|tests)\b",
}


@pytest.mark.parametrize("package", FORBIDDEN)
def test_arrows_point_downwards(package) -> None:
    for path in sorted((ROOT / package).glob("**/*.py")):
        assert not re.findall(FORBIDDEN[package], path.read_text(), re.MULTILINE), path


def test_no_trainer_imports_the_report() -> None:
    """Reports are read from files; a trainer that had to call them would drag them everywhere."""
    others = ("launch.py", "launch_probe.py", "__init__.py")  # the latter imports a name only when somebody asks for it
    trainers = [ROOT / name for name in SCRIPTS] + [p for p in sorted(ROOT.glob("lm/*.py")) if p.name not in others]
    for path in trainers:
        assert "lm.report" not in path.read_text(), path


def test_fp16_utils_imports_torch_alone() -> None:
    import sys

    allowed = set(sys.stdlib_module_names) | {"torch", "fp16_utils"}
    for path in sorted((ROOT / "fp16_utils").glob("*.py")):
        imported = re.findall(r"^(?:from|import) (\w+)", path.read_text(), re.MULTILINE)
        assert set(imported) <= allowed, path


@pytest.mark.parametrize(("path", "unaware"), [("lm/train.py", "fp16"), ("lm/model.py", "autocast(")])
def test_loop_and_model_know_no_precision_mode(path, unaware) -> None:
    code = re.sub(r'""".*?"""|#.*', "", (ROOT / path).read_text(), flags=re.DOTALL)
    assert unaware not in code
