"""The part "tests": the tests that are marked `cuda`, several at a time, and what became of each."""

import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

from benchmarks.gpu.packages import ROOT, python_path, version
from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from roundoff.errors import RunError

MARKED = ("-m", "cuda", "--continue-on-collection-errors")
ON_A_CPU = ("tests/lm/data/test_corpora.py",)
TOLERANT = ("-o", "filterwarnings=default", "-p", "no:cacheprovider", "-q")
"""Warnings of another torch are no failures."""
AT_ONCE = 4
ABSENT = re.compile(r"No module named '([\w.]+)'")


def run(report: Report, settings: Settings) -> None:
    """Run the tests, and report each that fails."""
    results = settings.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", *(ON_A_CPU if settings.small else MARKED), *TOLERANT]
    if not settings.small and version("pytest-xdist"):
        command += ["-n", str(AT_ONCE)]
    done = subprocess.run(
        [*command, f"--junitxml={results}"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": python_path()},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if not results.exists():
        raise RunError(f"pytest gave no results (exit code {done.returncode}): {last_line(done.stdout)}")
    record(report, results, " ".join(command[1:]))


def record(report: Report, results: Path, command: str) -> None:
    """Report what a JUnit file holds."""
    cases = list(ET.parse(results).getroot().iter("testcase"))  # noqa: S314  pytest has just written it
    failures, absent = {}, {}
    for case in cases:
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        for problem in (*case.iter("failure"), *case.iter("error")):
            text = problem.text or problem.get("message") or ""
            needed = ABSENT.search(text) if problem.get("message") == "collection failure" else None
            if needed:
                absent[name] = needed[1]
            else:
                failures[name] = error_of(text)
    skipped = sum(case.find("skipped") is not None for case in cases)
    passed = len(cases) - skipped - len(failures) - len(absent)
    report.figure(
        f"{command}: {passed} passed, {len(failures)} failed, {skipped} skipped, {len(absent)} files not read",
        command=command,
        passed=passed,
        failed=len(failures),
        skipped=skipped,
        not_read=absent,
        slowest=slowest(cases),
    )
    for name, package in absent.items():
        report.figure(f"{name} was not read: it needs {package}", name=name, needs=package)
    for name, line in failures.items():
        report.check(name, line, "passes", required=True)
    report.check("tests that passed", str(passed), "at least 1", as_expected=passed > 0, required=True)


def slowest(cases: list[ET.Element], count: int = 5) -> list[tuple[str, float]]:
    """Return names and seconds of the slowest tests."""
    times = [(f"{case.get('classname')}::{case.get('name')}", float(case.get("time") or 0)) for case in cases]
    return sorted(times, key=lambda pair: -pair[1])[:count]


def error_of(text: str) -> str:
    """Return the first line that pytest marks as an error, else the last line."""
    marked = [line[1:].strip() for line in text.splitlines() if re.match(r"E\s+\S", line)]
    return (marked[0] if marked else last_line(text))[:300]


def last_line(text: str) -> str:
    """Return the last line that is not empty."""
    return (text.strip().splitlines() or ["no output"])[-1][:300]
