"""kill -9, again and again, until in the end a run comes out that is, to the byte, the one that was left alone."""

import itertools
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import jobs
from forks import End, Forks
from lm.model.model_file import load_model
from lm.training.checkpoint import FORMAT
from programs import TINY, strict_json, write_corpus
from roundoff.runs.tensor_file import load_tensors
from runs import outcome

KILLS = 50
MODES = ("fp32", "manual", "fp16-optimizer-dynamic", "amp-fp16")
ANYWHERE = ""
FLAGS = [*TINY, "--lr", "30", "--log-interval", "5", "--dropout", "0.3", "--checkpoint-interval", "4"]
FILES = {
    *("corpus", "model.safetensors", "run"),
    *(f"run/{name}" for name in ("config.json", "steps.jsonl", "epochs.jsonl", "result.json")),
    *(f"run/{name}" for name in ("checkpoint.safetensors", "checkpoint.previous.safetensors")),
}


class Run:
    """One run in a folder of its own, as often as it takes.

    Attributes:
        saved: how many steps the last checkpoint holds; -1 for none.
        switching: the inode that bore both checkpoints' names when a kill came between link and replace. It may still
            do so after later kills, until the next checkpoint is in place.
    """

    def __init__(self, forks: Forks, folder: Path, mode: str) -> None:
        self.forks = forks
        self.folder = folder
        self.script, *self.flags = jobs.MODES[mode]
        self.saved = -1
        self.switching = 0
        folder.mkdir()
        write_corpus(folder / "corpus", train=24)

    def go_on(self, **kill: Any) -> End:
        """Start the run, or resume it, and look at what is there at the end."""
        started = (self.folder / "run" / "config.json").exists()
        flags = ["--resume", "run"] if started else [*FLAGS, *self.flags]
        end = self.forks.run(self.folder, self.script, *flags, **kill)
        if started and end.out:  # from the last checkpoint, and from no earlier one
            assert end.out.startswith("| going on with run at epoch "), end
            assert end.out.partition("\n")[0].endswith(f", step {max(self.saved, 0) + 1}"), (self.saved, end)
        assert (end.code, end.err) in ((0, ""), (None, "")), end
        self.check(end.at)
        return end

    def check(self, at: str) -> None:
        """Every file is whole, and the two checkpoints are of two moments, but `at` the one switch between them."""
        run = self.folder / "run"
        checkpoints = {path.name: load_tensors(path, FORMAT) for path in run.glob("checkpoint*.safetensors")}
        if self.saved >= 0 or "checkpoint.previous.safetensors" in checkpoints:
            assert "checkpoint.safetensors" in checkpoints
        if checkpoints:
            steps = {name: content["records"]["steps"] for name, content in checkpoints.items()}
            assert steps["checkpoint.safetensors"] >= max(self.saved, steps.get("checkpoint.previous.safetensors", 0))
            self.saved = steps["checkpoint.safetensors"]
            if len(set(steps.values())) < len(steps):
                one = (run / "checkpoint.safetensors").stat().st_ino
                assert at in (ANYWHERE, "after link", "before replace") or one == self.switching
                self.switching = one
        if (self.folder / "model.safetensors").exists():
            load_model(self.folder / "model.safetensors")
        for path in run.glob("*.json"):
            strict_json(path.read_text())
        for path in run.glob("*.jsonl"):
            *rows, _torn = path.read_text().split("\n")
            for row in rows:
                strict_json(row)
        leftovers = Counter(path.name.rsplit(".", 2)[0] for path in self.folder.rglob(".*"))
        assert set(leftovers.values()) <= {1}, leftovers  # they do not pile up

    def files(self) -> set[str]:
        """All but the corpus."""
        paths = {str(path.relative_to(self.folder)) for path in self.folder.rglob("*")}
        return {path for path in paths if not path.startswith("corpus/")}


@pytest.mark.slow
def test_fifty_kills(tmp_path: Path, record_testsuite_property: Callable[[str, object], None]) -> None:
    """Half of them at any moment, the others before and after each kind of system call of a checkpoint's writing."""
    chance = random.Random(0)
    kills: Counter[str] = Counter()
    with Forks() as forks:
        alone = {mode: Run(forks, tmp_path / mode, mode) for mode in MODES}
        ends = {mode: run.go_on() for mode, run in alone.items()}
        kinds = {step for end in ends.values() for step in end.steps}
        for mode in itertools.cycle(MODES):
            run = Run(forks, tmp_path / "killed", mode)
            while (end := run.go_on(**next_kill(chance, kills, kinds, ends[mode]))).code is None:
                kills[end.at] += 1
            assert outcome(run.folder) == outcome(alone[mode].folder)
            assert run.files() == alone[mode].files() == FILES
            shutil.rmtree(run.folder)
            if kills.total() == KILLS:
                break
    assert kills[ANYWHERE] == KILLS // 2
    assert kills.keys() - {ANYWHERE} == kinds
    assert len(kinds) >= 20
    for end in ends.values():
        order = [step.removeprefix("before ") for step in end.steps if step.startswith("before ")]
        assert "write" in order[: order.index("fsync")]
        order = [step for step in order if step in ("fsync", "unlink", "link", "replace")]
        assert order == ["fsync", "unlink", "link", "replace", "fsync"]
    record_testsuite_property("kills survived", f"{KILLS}, {KILLS // 2} of them while a checkpoint was being written")


def next_kill(chance: random.Random, kills: Counter[str], kinds: set[str], alone: End) -> dict[str, Any]:
    """When and where: by turns at any moment, and at the kind of step of a write that has been met least often."""
    if kills.total() == KILLS:
        return {}
    if 2 * kills[ANYWHERE] <= kills.total():
        return {"seconds": chance.uniform(0.0, 0.7 * alone.seconds)}
    step = min(sorted(kinds & set(alone.steps)), key=lambda step: (kills[step], chance.random()))
    return {"write": chance.randint(1, 3), "step": step, "times": chance.randrange(min(5, alone.steps.count(step)))}
