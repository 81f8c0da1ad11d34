"""A mistake is one clear line and exit code 2, and leaves nothing behind. The table of them is docs/errors.md."""

import os
import re
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from lm.model.model_file import load_model
from lm.model.recurrent import LSTM
from lm.options.config import make_args
from lm.training.checkpoint import DAMAGED, FILE, PREVIOUS
from lm.training.process import set_up
from programs import ROOT, SCRIPTS, TINY, Programs, read_run, start
from roundoff.errors import UsageError
from roundoff.program import exit_code


def table() -> list[tuple[str, str, str]]:
    """Read the rows of docs/errors.md: what is there before, the command, and the line."""
    lines = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8").splitlines()
    rows = [re.split(r"(?<!\\) ?\| ?", line.strip("|").strip(" ")) for line in lines if line.startswith("| ")][1:]
    rows = [["", *row] if len(row) == 2 else row for row in rows]
    return [tuple(cell.strip("` ").replace("\\|", "|") for cell in row) for row in rows]


def corpus_text(content: str | bytes) -> Callable[[Programs, str], object]:
    text = content if isinstance(content, bytes) else content.encode()
    return lambda programs, part: (programs.folder / "corpus" / f"{part}.txt").write_bytes(text)


SET_UPS: dict[str, Callable[..., object]] = {
    r"no corpus/(\w+)\.txt": lambda programs, part: (programs.folder / "corpus" / f"{part}.txt").unlink(),
    r"corpus/(\w+)\.txt is empty": corpus_text(""),
    r"corpus/(\w+)\.txt is blank": corpus_text(" \n\n \n"),
    r"corpus/(\w+)\.txt has six words": corpus_text("only five words and eos\n"),
    r"corpus/(\w+)\.txt is Latin-1": corpus_text("ein schöner Tag\n".encode("latin-1") * 50),
    r"a pipe": lambda programs: os.mkfifo(programs.folder / "pipe"),
    r"loop is a link to itself": lambda programs: (programs.folder / "loop").symlink_to("loop"),
    r"a run in run": lambda programs: programs.train("main", "--dry-run"),
    r"c\.toml is not UTF-8": lambda programs: (programs.folder / "c.toml").write_bytes(b"\xff\xfe"),
    r"c\.toml: (.*)": lambda programs, line: (programs.folder / "c.toml").write_text(line.replace("; ", "\n") + "\n"),
}
NEEDS_NO_GPU = re.compile(r"--cuda$|--device cuda|--accel")


def rows() -> list[object]:
    """Return each row for each script that it is of."""
    found = []
    for before, command, line in table():
        for script in SCRIPTS if command.startswith("TRAINER") else [command.partition(".py")[0]]:
            words = command.split()[1:]
            said = line.replace("TRAINER", script)
            marks = [
                pytest.mark.skipif(
                    torch.accelerator.is_available() and bool(NEEDS_NO_GPU.search(command)),
                    reason="this machine has an accelerator, so to ask for it is no mistake",
                )
            ]
            found.append(
                pytest.param(before, script, words, said, marks=marks, id=f"{before} {script} {' '.join(words)}")
            )
    return found


@pytest.mark.parametrize(("before", "script", "words", "said"), rows())
def test_a_mistake_gets_its_line(programs, before, script, words, said) -> None:
    if before:
        set_up, match = next((act, m) for name, act in SET_UPS.items() if (m := re.fullmatch(name, before)))
        set_up(programs, *match.groups())
    tiny = TINY if script in SCRIPTS and "--resume" not in words else []
    error = programs.refuse(script, *tiny, *words)
    pattern = ".*".join(re.escape(part) for part in said.split("…"))
    assert re.fullmatch(f"error: {pattern}\n", error), error


def test_the_table_is_whole() -> None:
    """So that a row that the reader above cannot parse is noticed."""
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    assert len(table()) == text.count("\n| ") - 1 > 100
    assert all(line and command for _, command, line in table())


@pytest.mark.parametrize(
    ("script", "flags", "remedy"),
    [
        ("main", ["--fp16"], "bfloat16"),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"], "bfloat16"),
        ("main_amp", [], "bfloat16"),
        ("main_amp", ["--dtype", "bfloat16"], "float16"),
    ],
)
@pytest.mark.parametrize("when", ["training", "evaluation", "backward"])
def test_a_half_dtype_that_this_cpu_cannot_run(programs, monkeypatch, script, flags, remedy, when) -> None:
    message = (
        "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with "
        "environment variable ONEDNN_VERBOSE=all to get additional diagnostic information."
    )
    forward = LSTM.forward

    def fail(*_):
        raise RuntimeError(message)

    def forward_on_another_cpu(self, input, hx=None):
        output, hidden = forward(self, input, hx)
        if when != "backward" and self.training == (when == "training"):
            fail()
        if when == "backward" and output.requires_grad:
            output.register_hook(fail)
        return output, hidden

    monkeypatch.setattr(LSTM, "forward", forward_on_another_cpu)
    error = programs.refuse(script, *TINY, *flags)
    dtype = "bfloat16" if "bfloat16" in flags else "float16"
    said = (f"LSTM in {dtype}", "could not create a primitive descriptor", f"--dtype {remedy}", "fp32")
    assert all(part in error for part in said), error


@pytest.mark.parametrize("name", ["hidden", "logits"])
def test_a_device_that_runs_another_dtype_than_asked_for(programs, monkeypatch, name) -> None:
    """As CUDA's autocast did, which ran recurrent layers in float16 for bfloat16."""
    forward = LSTM.forward

    def state_in_float16(self, input, hx):
        output, hidden = forward(self, input, hx)
        return output, tuple(h.half() for h in hidden)

    if name == "hidden":
        monkeypatch.setattr(LSTM, "forward", state_in_float16)
    else:
        monkeypatch.setattr("lm.model.language_model.linear", lambda *operands: F.linear(*operands).half())
    error = programs.refuse("main_amp", *TINY, "--dtype", "bfloat16")
    said = rf"LSTM was to run in bfloat16, but .* gives {name} in float16; try main_amp.py --dtype float16, or fp32"
    assert re.search(said, error), error


def test_a_gpu_that_torch_has_no_code_for(monkeypatch) -> None:
    """It is found before a model goes there."""
    said = "CUDA error: no kernel image is available for execution on the device\nmore"

    def fail(*_: object, device: str) -> None:
        raise RuntimeError(said)

    monkeypatch.setattr("lm.training.process.device_name", lambda device: f"GPU {device}")
    monkeypatch.setattr(torch, "zeros", fail)
    options = replace(make_args("main"), device="cuda")
    with pytest.raises(UsageError, match=re.escape(f"GPU cuda: this torch ({torch.__version__}) has no code for it")):
        set_up(options)
    said = "CUDA error: out of memory"
    with pytest.raises(RuntimeError, match="out of memory"):
        set_up(options)


@pytest.mark.parametrize("run_dir", ["run", "deep/run"])
@pytest.mark.parametrize("name", ["", "..", "config.json", "steps.jsonl", "result.json", FILE, PREVIOUS, DAMAGED])
@pytest.mark.parametrize("flag", ["--save", "--onnx-export"])
def test_save_may_not_be_the_runs_own(programs, flag, name, run_dir) -> None:
    """Else the model took the checkpoint's place, or the run its directory's."""
    (programs.folder / "link").symlink_to(".")
    place = f"link/{run_dir}/{name}"
    error = programs.refuse("main", *TINY, flag, place, "--run-dir", run_dir)
    assert f"{flag} {place.removesuffix('/')} is the run's own" in error


def test_save_may_not_be_the_runs_own_when_it_goes_on(programs) -> None:
    programs.train("main")
    assert f"--save run/{FILE} is" in programs.refuse("main", "--resume", "run", "--save", f"run/{FILE}")
    assert "--save runs is" in programs.refuse("main", *TINY[:-2], "--save", "runs")
    (programs.folder / "elsewhere").symlink_to(f"run/{FILE}")
    (programs.folder / "run" / FILE).rename(programs.folder / "far")
    (programs.folder / "run" / FILE).symlink_to("../far")
    for place in ("elsewhere", "far", f"run/{FILE}"):
        assert f"--save {place} is" in programs.refuse("main", "--resume", "run", "--save", place)


@pytest.mark.parametrize("flag", ["--data", "--save", "--run-dir"])
def test_a_path_that_is_not_utf8(programs, flag) -> None:
    (programs.folder / "corpus").rename(programs.folder / "caf\udce9")
    assert f"{flag} caf\\udce9 is not UTF-8" in programs.refuse("main", *TINY, flag, "caf\udce9")


def test_default_run_dir_where_runs_is_a_file(programs) -> None:
    (programs.folder / "runs").write_text("")
    error = programs.refuse("main", *TINY[:-2], "--dry-run")
    assert error.startswith("error: runs: cannot write there"), "nobody gave --run-dir"


def test_a_new_run_dir_of_several_levels_is_made(programs) -> None:
    assert programs.run("main", *TINY, "--dry-run", "--run-dir", "new/deep/run").code == 0
    assert read_run(programs.folder / "new" / "deep" / "run").result["status"] == "finished"


def test_the_folders_of_the_model_are_made(programs) -> None:
    """As that of --run-dir is; and not before the run starts, so that a mistake leaves none behind."""
    programs.refuse("main", *TINY, "--save", "new/deep/model", "--run-dir", "corpus/train.txt")
    run = programs.train("main", "--dry-run", "--save", "new/deep/model")
    assert run.config["options"]["save"] == "new/deep/model"
    assert load_model(programs.folder / "new" / "deep" / "model")[1]
    assert programs.run("main", "--resume", "run", "--save", "other/model").code == 0
    assert load_model(programs.folder / "other" / "model")[1]


@pytest.mark.slow
def test_the_process_itself_shows_no_traceback(programs) -> None:
    """What the other tests see in their own process, once as a user does."""
    before = programs.files()
    process = start(programs.folder, "main_amp", *TINY, "--save", "/proc/model", stdout=-1, stderr=-1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"error: ")
    assert programs.files() == before


def test_ctrl_c_before_training() -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
