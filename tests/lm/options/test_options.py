"""Every option has one meaning, wherever its value comes from: flags, a file, Python, Sacred, or a run to resume."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import roundoff
from lm.options.command_line import make_parser, read_command_line
from lm.options.config import make_args, merge, parse_args, stored_options
from lm.options.modes import mode_names
from lm.options.options import MAY_CHANGE, SCRIPTS, Options, as_values, checked, help_of, option_of, options_of, words
from lm.options.resolve import resolve
from programs import ROOT, TINY, read_run
from roundoff.cli import nearest
from roundoff.errors import UsageError
from roundoff.runs.json_text import to_json
from runs import kill_at, outcome, resume

every_script = pytest.mark.parametrize("script", SCRIPTS)
EVERY = [*SCRIPTS, "generate", "compare", "probe"]

GIVEN: dict[str, Any] = {
    "data": "d", "model": "GRU", "emsize": 3, "nhid": 3, "nlayers": 4, "lr": 5.0, "clip": math.inf, "epochs": 7,
    "batch_size": 8, "bptt": 9, "dropout": 0.1, "tied": True, "seed": 11, "log_interval": 12, "fp16": True,
    "device": "cpu", "run_dir": Path("r"), "save": Path("s.st"), "max_steps": 14,
    "dry_run": True, "max_skipped": 17, "deterministic": True,
    "checkpoint_interval": 18, "optimizer": "adamw", "accumulate": 6, "lr_schedule": "cosine", "warmup": 19,
}  # fmt: skip
"""A value for every option that all trainers have and every machine can do, but for loss scales."""
STATIC, DYNAMIC = {"static_loss_scale": 13.0}, {"init_scale": 15.0, "scale_window": 16}
SCALES: dict[str, list[dict[str, Any]]] = {
    "main": [STATIC],
    "main_fp16_optimizer": [STATIC, DYNAMIC | {"dynamic_loss_scale": True}],
    "main_amp": [STATIC, DYNAMIC],
}
"""Trainer -> the options of its loss scales that it can be given together."""


def toml(values: dict[str, Any], dash: str) -> str:
    """Write `values` as a TOML file, with `dash` between the words of a name."""
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
    return "".join(
        f"{name.replace('_', dash)} = {'inf' if value == math.inf else json.dumps(value)}\n"
        for name, value in plain.items()
    )


def from_file(tmp_path: Path, script: str, values: dict[str, Any], dash: str) -> Options:
    (tmp_path / "c.toml").write_text(toml(values, dash))
    return parse_args(script, None, ["--config", str(tmp_path / "c.toml")])


def underscored(word: str) -> str:
    """Return a word of the command line with "_" in its flag."""
    name, equals, value = word.partition("=")
    return f"--{name[2:].replace('-', '_')}{equals}{value}"


SOURCES = {
    "flags": lambda tmp_path, script, values: parse_args(script, None, words(values)),
    "flags apart": lambda tmp_path, script, values: parse_args(
        script, None, [part for word in words(values) for part in word.split("=", 1)]
    ),
    "flags with _": lambda tmp_path, script, values: parse_args(script, None, [underscored(w) for w in words(values)]),
    "file with -": lambda tmp_path, script, values: from_file(tmp_path, script, values, "-"),
    "file with _": lambda tmp_path, script, values: from_file(tmp_path, script, values, "_"),
    "file under flags": lambda tmp_path, script, values: parse_args(
        script, None, ["--config", str(write(tmp_path, "lr = 1\nepochs = 1\ntied = false\n")), *words(values)]
    ),
    "Python": lambda tmp_path, script, values: make_args(script, **values),
    "texts": lambda tmp_path, script, values: merge(
        script, checked(script, {n: v if isinstance(v, bool) else str(v) for n, v in values.items()})
    ),
}  # fmt: skip


def write(folder: Path, content: str) -> Path:
    (folder / "c.toml").write_text(content, encoding="utf-8")
    return folder / "c.toml"


@pytest.mark.parametrize("source", SOURCES)
@every_script
def test_every_source_gives_the_same_options(tmp_path, script, source) -> None:
    missing = options_of(script).keys()
    for scale in SCALES[script]:
        given = GIVEN | scale
        found = SOURCES[source](tmp_path, script, given)
        assert {name: getattr(found, name) for name in given} == given
        assert found == make_args(script, **given)
        missing -= given.keys()
    assert (
        missing
        == {"use_optimizer", "cuda", "accel", "tf32", "tensorboard", "onnx_export", "resume", "nhead"}
        | {
            "main": {"init_scale", "scale_window"},
            "main_fp16_optimizer": {"fp16_utils"},
            "main_amp": {"dtype", "opt_level"},
        }[script]
    )


@pytest.mark.parametrize("name", ["init_scale", "scale_window"])
def test_an_option_without_effect_is_refused_wherever_one_trainer_is_given_it(tmp_path, name) -> None:
    """What several trainers are given, by compare.py or by a run to resume, is for those that it is for."""
    for source in set(SOURCES) - {"texts"}:
        with pytest.raises(UsageError, match=r"with main\.py, whose loss scale is static: leave it out, or use"):
            SOURCES[source](tmp_path, "main", {name: 4})
    assert merge("main", {name: 4}).script == "main"
    (tmp_path / "config.json").write_text(to_json({"options": as_values(merge("main", {name: 4}))}))
    assert getattr(parse_args("main", None, ["--resume", str(tmp_path)]), name) == 4


def test_the_learning_rate_follows_from_optimizer_and_model() -> None:
    rates = {("sgd", "GRU"): 20.0, ("sgd", "Transformer"): 5.0} | {("adamw", m): 0.001 for m in ("GRU", "Transformer")}
    assert {(o, m): make_args("main", optimizer=o, model=m).lr for o, m in rates} == rates


@every_script
def test_defaults_are_the_documented_ones(script) -> None:
    documented = {
        "data": "./data/wikitext-2", "model": "LSTM", "emsize": 200, "nhid": 200, "nlayers": 2, "nhead": 2, "lr": 20,
        "clip": 0.25, "epochs": 40, "batch_size": 20, "bptt": 35, "dropout": 0.2, "tied": False, "seed": 1111,
        "cuda": False, "log_interval": 200, "fp16": False, "max_skipped": 50, "max_steps": None, "dry_run": False,
        "device": "cpu", "deterministic": False, "tf32": False, "optimizer": "sgd", "init_scale": 2.0**16,
        "scale_window": 2000, "checkpoint_interval": None, "run_dir": None, "resume": None, "tensorboard": False,
        "accumulate": 1, "lr_schedule": "anneal", "warmup": 0,
    }  # fmt: skip
    for found in (parse_args(f"{script}.py", "", []), make_args(script), make_args(script, max_steps=None)):
        assert {name: getattr(found, name) for name in documented} == documented


VALUES = {
    "model": st.sampled_from(option_of(options_of(None)["model"]).choices),
    "emsize": st.integers(1, 10**6).map(lambda n: 2 * n),
    "lr": st.floats(1e-30, 1e30),
    "clip": st.floats(0, exclude_min=True, allow_infinity=True, allow_nan=False),
    "dropout": st.floats(0, 1, exclude_max=True),
    "seed": st.integers(0, 2**63 - 1),
    "dry_run": st.booleans(),
    "static_loss_scale": st.floats(2.0**-100, 2.0**127),
    "save": st.text(min_size=1).filter(lambda t: t.isprintable()).map(lambda t: Path("x" + t)),
    "run_dir": st.sampled_from([Path("-x"), Path("a b"), Path("a=b")]),
}


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(values=st.fixed_dictionaries({}, optional=VALUES))
def test_options_survive_a_command_line_and_a_config_json(tmp_path, values) -> None:
    """As they do when compare.py starts a trainer, and when a run is resumed."""
    asked = make_args("main", **values)
    assert parse_args("main", None, words(values)) == asked
    (tmp_path / "config.json").write_text(to_json({"options": as_values(asked)}), encoding="utf-8")
    assert resolve(Options(script="main", **stored_options(tmp_path, "main"))) == asked
    assert merge("main", {"resume": tmp_path}).lr == asked.lr


@every_script
def test_every_option_is_in_config_json_and_gives_the_run_again(programs, script) -> None:
    programs.train(script, "--dry-run", "--clip", "inf")
    config = read_run(programs.folder / "run").config
    aliases = {"use_optimizer", "cuda", "accel", *(["fp16"] if script == "main_amp" else [])}
    assert config["options"].keys() == Options.__dataclass_fields__.keys() - {"resume"} - aliases
    again = resolve(Options(script=script, **stored_options(programs.folder / "run", script)))
    assert json.loads(to_json(as_values(again))) == config["options"]


@pytest.mark.parametrize(
    ("started", "flags", "said"),
    [
        ("main", [], None),
        ("main", ["--lr", "20"], None),  # as it was resolved
        ("main", ["--epochs", "9", "--data", "d", "--save", "s", "--log-interval", "1"], None),
        ("main", ["--optimizer", "sgd"], None),
        ("main --use-optimizer", ["--use-optimizer"], None),
        ("main --optimizer adamw", ["--use-optimizer"], None),
        ("main --tensorboard --onnx-export m", ["--no-tensorboard", "--onnx-export", "n"], None),  # not there now
        ("main", ["--lr", "6"], "--lr 6.0: the run was started with 20.0; leave the flag out, or start a new run"),
        ("main", ["--tied"], "--tied True: the run was started with False"),
        ("main --tied", ["--emsize", "100"], "--emsize 100: the run was started with 200"),
        ("main --max-steps 2", ["--max-steps", "3"], None),
        ("main", ["--fp16"], "--fp16 True: the run was started with False"),
        ("main", ["--optimizer", "adamw"], "--optimizer adamw: the run was started with sgd"),
        ("main", ["--use-optimizer"], "--optimizer adamw: the run was started with sgd"),
        ("main --optimizer adamw", ["--no-use-optimizer"], "--optimizer sgd: the run was started with adamw"),
        ("main", ["--run-dir", "other"], "--run-dir other: the run was started with the default"),
        ("main --lr-schedule constant", ["--epochs", "9"], None),
        ("main --lr-schedule cosine", ["--epochs", "40", "--lr-schedule", "cosine"], None),
        ("main --lr-schedule cosine", ["--epochs", "9"], "--epochs 9: the learning rate of the run falls along a co"),
        ("main --lr-schedule cosine", ["--max-steps", "9"], "length that it was started with (no such limit); leave"),
        ("main --lr-schedule cosine --max-steps 2", ["--max-steps", "3"], "that it was started with (2); leave the fl"),
        ("main", ["--lr-schedule", "cosine"], "--lr-schedule cosine: the run was started with anneal"),
        ("main", ["--warmup", "2"], "--warmup 2: the run was started with 0"),
        ("main", ["--accumulate", "2"], "--accumulate 2: the run was started with 1"),
        ("main_amp", ["--dtype", "float16"], None),
        ("main_amp", ["--fp16"], None),
        ("main_amp", ["--no-fp16"], None),
        ("main_amp", ["--dtype", "bfloat16"], "--dtype bfloat16: the run was started with float16"),
        ("main_amp --dtype bfloat16", ["--fp16"], "--dtype float16: the run was started with bfloat16"),
        ("main_amp", ["--static-loss-scale", "8"], "--static-loss-scale 8.0: the run was started with the default"),
        ("main_fp16_optimizer", ["--dynamic-loss-scale"], "--dynamic-loss-scale True: the run was started with False"),
        (
            "main_fp16_optimizer --fp16 --dynamic-loss-scale",
            ["--static-loss-scale", "64"],
            "--static-loss-scale 64.0: the run was started with the default",
        ),
    ],
)
def test_what_a_resumed_run_may_be_given(tmp_path, monkeypatch, started, flags, said) -> None:
    script, *words = started.split()
    (tmp_path / "config.json").write_text(to_json({"options": as_values(parse_args(script, None, words))}))
    if "--tensorboard" in words:
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
        monkeypatch.delitem(sys.modules, "roundoff.runs.event_files", raising=False)
    command = ["--resume", str(tmp_path), *flags]
    if said is None:
        found = parse_args(script, None, command)
        assert (found.resume, found.run_dir) == (tmp_path, tmp_path)
        return
    with pytest.raises(UsageError, match=re.escape(said)):
        parse_args(script, None, command)


def test_a_run_from_before_an_option_goes_on_with_its_default(tmp_path) -> None:
    asked = make_args("main", lr=3)
    older = {n: v for n, v in as_values(asked).items() if n not in ("accumulate", "lr_schedule", "warmup")}
    (tmp_path / "config.json").write_text(to_json({"options": older}))
    assert as_values(merge("main", {"resume": tmp_path})) == as_values(asked) | {"run_dir": str(tmp_path)}


def test_what_may_change_changes_no_step() -> None:
    assert set(MAY_CHANGE) == {
        *("data", "epochs", "max_steps", "log_interval", "tensorboard", "save", "onnx_export", "checkpoint_interval"),
    }
    text = help_of(options_of(None)["resume"])
    assert all(f"--{name.replace('_', '-')}" in text for name in MAY_CHANGE)


CONFIG = (
    'data = "corpus"\nemsize = 8\nnhid = 8\nbatch-size = 4\nbptt = 5\nepochs = 2\ndropout = 0.5\nlog_interval = 6\n'
)
SAME = [*TINY[:-2], "--dropout", "0.5", "--log-interval", "6"]


def test_a_run_from_a_file_is_the_run_with_flags_and_is_resumed_without_the_file(programs) -> None:
    write(programs.folder, CONFIG)
    assert programs.run("main", *SAME, "--run-dir", "run").code == 0
    expected = outcome(programs.folder)
    (programs.folder / "run").rename(programs.folder / "whole")
    kill_at(programs, 25, "main", "--config", "c.toml", "--run-dir", "run")
    (programs.folder / "c.toml").unlink()
    resume(programs, "main")
    assert outcome(programs.folder) == expected


@pytest.mark.slow
def test_compare_takes_the_options_of_a_file(programs) -> None:
    write(programs.folder, CONFIG + "max_steps = 2\nseed = 5\n")
    words = ["--modes", "fp32", "--out", "out", "--", "--config", "c.toml", "--lr", "3"]
    assert programs.run("compare", *words).code == 0
    options = read_run(programs.folder / "out" / "runs" / "fp32-5").config["options"]
    assert (options["lr"], options["max_steps"], options["seed"], options["emsize"]) == (3.0, 2, 5, 8)


@pytest.mark.parametrize("script", EVERY)
def test_version(programs, script) -> None:
    done = programs.run(script, "--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{script}.py {roundoff.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("script", [*SCRIPTS, "generate"])
def test_help_explains_every_option_and_gives_its_default(programs, script) -> None:
    done = programs.run(script, "--help")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(f"usage: {script}.py ")
    assert "default: None" not in done.out  # the program's word; a user can do nothing with it
    blocks = re.split(r"\n  (?=-)", done.out.partition("options:")[2])[1:]
    if script in SCRIPTS:
        assert len(blocks) == len(options_of(script)) + 3  # --help, --version, --config
    for block in blocks:
        option = " ".join(re.split(r"\n\n", block)[0].split())
        names = re.match(r"(-\S+(,| [A-Z{]\S*)? ?)+", option)[0]
        explained, _, default = option.removeprefix(names).partition("(default: ")
        assert len(explained.split()) > 1, f"{option!r} explains nothing"
        takes_a_value = re.search(r" [A-Z{]", names)
        optional = {"--config", "--max-steps", "--checkpoint-interval", "--onnx-export", "--opt-level", "--resume"}
        assert bool(default) == bool(takes_a_value and not optional & set(names.split())), f"{option!r} on its default"


@every_script
def test_help_is_in_groups(programs, script) -> None:
    out = programs.run(script, "--help").out
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", "data", "model", "training", "precision", "records"]
    assert f"With Sacred: {script}.py [COMMAND]" in out


@pytest.mark.slow
def test_the_shell_completes_flags_and_choices(tmp_path) -> None:
    """As the shell asks: the line so far in the environment, the answer in a file."""
    line = "main.py --model "
    asks = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": len(line)}
    asks |= {"_ARGCOMPLETE_STDOUT_FILENAME": tmp_path / "answer"}
    environment = os.environ | {name: str(value) for name, value in asks.items()}
    subprocess.run([sys.executable, ROOT / "main.py"], env=environment, cwd=tmp_path, timeout=120, check=False)
    answer = (tmp_path / "answer").read_text().replace("\x0b", " ").replace("\x0d", " ").split()
    assert answer == ["RNN_TANH", "RNN_RELU", "LSTM", "GRU", "Transformer"]


@pytest.mark.parametrize("script", EVERY)
def test_argcomplete_finds_its_mark(script) -> None:
    assert b"PYTHON_ARGCOMPLETE_OK" in (ROOT / f"{script}.py").read_bytes()[:1024]


def test_flags_after_two_dashes_are_of_all_trainers() -> None:
    found = read_command_line(make_parser(None, None), None, ["--dtype=bfloat16", "--fp16-utils", "own", "--lr", "3"])
    assert found == {"dtype": "bfloat16", "fp16_utils": "own", "lr": 3.0}


@pytest.mark.parametrize(("short", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_a_dtype_has_a_short_name_wherever_it_is_given(tmp_path, short, name) -> None:
    file = write(tmp_path, f'dtype = "{short}"\n')
    for found in (
        parse_args("main_amp", None, ["--dtype", short]),
        parse_args("main_amp", None, ["--config", str(file)]),
        make_args("main_amp", dtype=short),
    ):
        assert found.dtype == name


def test_a_mode_has_a_short_name() -> None:
    assert mode_names("fp32,bf16,fp16") == ["fp32", "amp-bf16", "amp-fp16"]


@pytest.mark.parametrize(
    ("word", "known", "meant"),
    [
        ("tie", ["tied", "time", "test"], "tied"),  # the only one that it begins
        ("ltsm", ["LSTM", "GRU"], "LSTM"),
        ("t", ["tied"], None),
        ("zzz", ["LSTM"], None),
    ],
)
def test_what_was_meant(word, known, meant) -> None:
    assert nearest(word, known) == meant
