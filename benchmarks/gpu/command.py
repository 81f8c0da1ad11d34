"""Answer in minutes, in one command, what this project still has to learn from a GPU.

Each part has a process of its own, and writes DIR/<part>.json as it goes. A part that fails or hangs costs the others
nothing. A check that is "unexpected" tells something about torch or the GPU; one that is "WRONG" is a fault of this
project. Exit code 1: a part has failed. With --device cpu every part runs at a small size, to try the command itself.
"""

import argparse
import importlib
import json
import multiprocessing
import os
import signal
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from benchmarks.gpu import report
from benchmarks.gpu.packages import BASE, ROOT, require
from benchmarks.gpu.settings import Settings, short_corpus
from lm.data import corpora
from lm.data.corpora import BUILT_IN, DEFAULT
from lm.options.device import find_device
from roundoff.cli import OneLineParser, whole
from roundoff.errors import UsageError


@dataclass(frozen=True)
class Part:
    """A part of the command.

    Attributes:
        module: has `run(report, settings)`; it is imported in the part's own process.
        seconds: after which it is stopped.
        packages: that it needs beyond torch and numpy.
        about: what it does.
    """

    module: str
    seconds: int
    packages: tuple[str, ...]
    about: str


PARTS = {
    "facts": Part(
        "benchmarks.gpu.facts", 60, (), "what torch and cuDNN do here, where it decides how this project must be"
    ),
    "tests": Part("benchmarks.gpu.suite", 180, ("pytest", *BASE), "the tests marked cuda"),
    "speed": Part(
        "benchmarks.gpu.speed", 150, BASE, "a plain loop and five modes: step, launch, kernels, memory, evaluation"
    ),
    "commands": Part("benchmarks.gpu.commands", 180, BASE, "nine commands of the README, 400 steps each"),
    "bits": Part("benchmarks.gpu.bits", 150, BASE, "whether runs that must be equal are so in every bit"),
    "resume": Part(
        "benchmarks.gpu.resume", 120, BASE, "kill -9 at a checkpoint, resume, and compare with a run never stopped"
    ),
}


def parse_args(argv: list[str]) -> argparse.Namespace:
    """Read the command line."""
    listed = "; ".join(f"{name}: {part.about}" for name, part in PARTS.items())
    parser = OneLineParser(
        prog="python -m benchmarks gpu", description=__doc__, epilog=f"Parts: {listed}.", allow_abbrev=False
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a JSON file for each part goes there")
    parser.add_argument("--parts", metavar="PART,PART", help=f"of {','.join(PARTS)} (default: all)")
    parser.add_argument("--device", metavar="DEVICE", help="cuda (default), cuda:N, or cpu at a small size")
    parser.add_argument(
        "--data",
        metavar="FOLDER",
        help="the corpus, as for the trainers (default: WikiText-2 of this project); a CPU takes its first lines",
    )
    parser.add_argument(
        "--seconds", type=whole, default=580, metavar="N", help="no part goes on after them (default: 580)"
    )
    args = parser.parse_args(argv)
    args.parts = list(PARTS) if args.parts is None else args.parts.split(",")
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"there is no part {part!r}; choose from {', '.join(PARTS)}")
    return args


def find(device: str | None) -> str:
    """Return the device to run on.

    Raises:
        UsageError: it is not there, or neither a CPU nor a CUDA GPU.
    """
    device = device or "cuda"
    try:
        found = find_device(device)
    except UsageError as error:
        if not device.startswith("cuda"):
            raise
        reason = str(error).removesuffix("; to run on the CPU, leave the flag out")
        raise UsageError(f"{reason}; --device cpu tries every part at a small size") from None
    if found != "cpu" and not found.startswith("cuda"):
        raise UsageError(f"--device {found} is not supported here; give cuda, cuda:N or cpu")
    return found


def main(argv: list[str]) -> int:
    """Run the parts that the command line names; return 1 if one has failed."""
    args = parse_args(argv)
    device = find(args.device)
    data = corpus(args.data)
    if args.out.exists() and not args.out.is_dir():
        raise UsageError(f"--out {args.out}: this is a file; give a folder")
    args.out.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, _terminate)
    deadline = time.monotonic() + args.seconds
    with tempfile.TemporaryDirectory(prefix="roundoff-gpu-") as scratch:
        if device == "cpu":
            data = short_corpus(data, Path(scratch, "corpus"))
        settings = Settings(args.out.resolve(), device, data, Path(scratch))
        reports = [run_part(name, PARTS[name], settings, deadline) for name in args.parts]
    print()
    for content in reports:
        print("\n".join((summary(content), *lessons(content))))
    print(f"the reports are in {args.out}")
    return int(any(content["error"] for content in reports))


def _terminate(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)  # on its way out the command ends the part's processes


def corpus(given: str | None) -> str:
    """Return the corpus that --data names, or the one that comes with this project.

    Raises:
        UsageError: it cannot be read.
    """
    if given == BUILT_IN:
        return given
    data = str((ROOT / DEFAULT) if given is None else Path(given).resolve())
    corpora.read(data)
    return data


def run_part(name: str, part: Part, settings: Settings, deadline: float) -> dict[str, Any]:
    """Run a part in a process of its own, to its end or the end of its time; return its report."""
    path = settings.out / f"{name}.json"
    print(f"{name:8} | {part.about}{', here at a small size' if settings.small else ''}", flush=True)
    seconds = min(part.seconds, deadline - time.monotonic())
    report.Report(path, name, settings.device)  # in place of one from an earlier call
    if seconds <= 0:
        return failed(path, name, "no time was left for it")
    process = multiprocessing.get_context("spawn").Process(target=work, args=(name, part, path, settings))
    process.start()
    try:
        process.join(seconds)
        if process.is_alive():
            return failed(path, name, f"it was stopped after {seconds:.0f} s")
    finally:
        end_group(process)
    if process.exitcode:
        return failed(path, name, f"its process ended with exit code {process.exitcode}")
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


def work(name: str, part: Part, path: Path, settings: Settings) -> None:
    """Run a part in this process, which becomes the head of a group with all the processes that it starts."""
    os.setpgid(0, 0)
    run_here(name, part, path, settings)


def run_here(name: str, part: Part, path: Path, settings: Settings) -> None:
    """Run a part in this process; all that goes wrong stands in its report."""
    content = report.Report(path, name, settings.device)
    try:
        require(part.packages)
        importlib.import_module(part.module).run(content, settings)
    except Exception as error:  # the other parts go on
        content.fail(error)
    content.end()


def end_group(process: BaseProcess) -> None:
    """Kill what is left of a part's processes."""
    assert process.pid is not None
    with suppress(ProcessLookupError):  # all have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()  # it may not have made its group yet
    process.join()


def failed(path: Path, name: str, error: str) -> dict[str, Any]:
    """Keep and print why a part's process is no more; return the part's report."""
    print(f"{name:8} | {'FAILED':11} | {error}", flush=True)
    return report.mark(path, error)


def summary(content: dict[str, Any]) -> str:
    """Return a line on a report."""
    checks = content["checks"]
    good = sum(check["as_expected"] for check in checks)
    line = f"{content['part']:8} | {content['seconds']:.1f} s"
    if checks:
        line += f" | {good} of {len(checks)} as expected"
    return f"{line} | FAILED: {content['error'][:300]}" if content["error"] else line


def lessons(content: dict[str, Any]) -> list[str]:
    """Return a line for each check that is not as expected, or that settles a doubt."""
    return [report.line_of(check) for check in content["checks"] if not check["as_expected"] or "means" in check]
