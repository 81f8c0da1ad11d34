"""The trainers under Sacred: the same run as with flags, and all of it where its observers look."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import jobs
import lm.extras
from lm.options.options import help_of, options_of
from programs import MODEL, ROOT, SCRIPTS, TINY, Done, Programs, read_run
from runs import kill_at, outcome, resume

every_script = pytest.mark.parametrize("script", SCRIPTS)

# As users know them: the defaults of this front, the first 15 in the order of the alphabet.
SHOWN = {
    "batch_size": "32", "bptt": "35", "clip": "0.25", "dataset": "'./data'", "dropout": "0.2", "emsize": "200",
    "epochs": "40", "log_interval": "200", "lr": "20.0", "model_type": "'LSTM'", "nhid": "200", "nlayers": "2",
    "save": "'model.safetensors'", "seed": "257", "tied": "True",
}  # fmt: skip
UPDATES = ["dataset=corpus", "emsize=8", "nhid=8", "batch_size=4", "bptt=5", "epochs=2", "run_dir=run"]
FLAGS = [*TINY, "--seed", "257", "--tied"]
PRECISION = {
    "main": (["fp16=True", "static_loss_scale=64"], ["--fp16", "--static-loss-scale", "64"]),
    "main_fp16_optimizer": (["fp16=True", "dynamic_loss_scale=True"], ["--fp16", "--dynamic-loss-scale"]),
    "main_amp": (["dtype=bfloat16", "model_type=GRU"], ["--dtype", "bfloat16", "--model", "GRU"]),
}


def train(programs: Programs, script: str, *updates: str, options: tuple[str, ...] = ()) -> Done:
    done = programs.run(script, *options, "with", *UPDATES, *updates)
    assert done.code == 0, done
    return done


def stored(programs: Programs, name: str) -> Any:
    return json.loads((programs.folder / "observed" / "1" / name).read_text())


def shown(out: str) -> dict[str, tuple[str, str]]:
    """Name -> value and comment, in the order of the lines of print_config."""
    lines = [re.fullmatch(r"  (\w+) = (.*?)\s+# (.+)", line) for line in out.splitlines()[1:]]
    assert all(lines), out
    return {match[1]: (match[2], match[3]) for match in lines if match}


@every_script
def test_print_config_shows_every_option_with_its_default_and_comment(programs, script):
    done = programs.run(script, "print_config")
    assert done.code == 0
    assert done.out.startswith("Configuration (modified, added, typechanged, doc):\n")
    lines = shown(done.out)
    assert {name: value for name, (value, _) in list(lines.items())[:15]} == SHOWN
    assert list(lines)[:15] == list(SHOWN)
    options = options_of(script)
    own = list(lines)[15:]
    assert own == sorted(options.keys() - SHOWN.keys() - {"data", "model"})
    for name in own:
        default = options[name].default
        assert lines[name][0] == repr(default)
    for name, (_, comment) in lines.items():
        help_text = help_of(options[{"dataset": "data", "model_type": "model"}.get(name, name)])
        assert comment.startswith(help_text)
    assert programs.files().keys() == {"corpus", *(f"corpus/{part}.txt" for part in ("train", "valid", "test"))}


def test_print_config_with_changes(programs):
    lines = shown(programs.run("main", "print_config", "with", "lr=0.5", "tied=False", "model_type=GRU").out)
    assert (lines["lr"][0], lines["tied"][0], lines["model_type"][0]) == ("0.5", "False", "'GRU'")


@every_script
def test_a_run_is_the_run_with_the_same_flags(programs, script):
    updates, flags = PRECISION[script]
    train(programs, script, *updates, "run_dir=sacred", "save=sacred.pt")
    assert programs.run(script, *FLAGS, *flags).code == 0
    assert outcome(programs.folder, "sacred", "sacred.pt") == outcome(programs.folder)
    ours, theirs = (read_run(programs.folder / name).config for name in ("run", "sacred"))
    assert {name for name in ours if ours[name] != theirs[name]} == {"options", "environment"}
    differing = {name for name, value in ours["options"].items() if value != theirs["options"][name]}
    assert differing == {"run_dir", "save"}


def test_the_documented_line(programs):
    line = (
        "with model_type=RNN_TANH lr=0.2 nhid=150 nlayers=1 bptt=20 dropout=0.5 save=rnn_01.pt emsize=250 tied=False "
        "epochs=3"
    )
    (programs.folder / "data").mkdir()
    (programs.folder / "corpus").rename(programs.folder / "data" / "wikitext-2")
    assert programs.run("main", *line.split(), "batch_size=4", "run_dir=run").code == 0
    config = read_run(programs.folder / "run").config["options"]
    documented = {
        "model": "RNN_TANH", "lr": 0.2, "nhid": 150, "nlayers": 1, "bptt": 20, "dropout": 0.5, "save": "rnn_01.pt",
        "emsize": 250, "tied": False, "epochs": 3, "seed": 257, "clip": 0.25, "log_interval": 200, "fp16": False,
    }  # fmt: skip
    assert {name: config[name] for name in documented} == documented
    assert (programs.folder / "rnn_01.pt").exists()


@every_script
def test_what_the_file_observer_holds(programs, script):
    updates, _ = PRECISION[script]
    done = train(programs, script, *updates, "log_interval=6", "save=kept.pt", options=("-F", "observed"))
    run = read_run(programs.folder / "run")
    metrics = stored(programs, "metrics.json")

    ends = [6, 12, 18, 24, 30, 36]
    parts = [run.steps[end - 6 : end] for end in ends]
    means = {name: [sum(row[name] for row in rows) / 6 for rows in parts] for name in ("loss", "grad_norm")}
    lasts = {name: [rows[-1][name] for rows in parts] for name in ("loss_scale", "lr")}
    for name, values in (means | lasts).items():
        assert (metrics[f"train.{name}"]["steps"], metrics[f"train.{name}"]["values"]) == (ends, values)
    assert metrics["train.skipped"]["values"] == [sum(not row["applied"] for row in rows) for rows in parts]
    assert metrics["train.ppl"]["values"] == [math.exp(loss) for loss in means["loss"]]
    assert all(value > 0 for value in metrics["train.tokens_per_second"]["values"])
    for name, column in {"loss": "valid_loss", "ppl": "valid_ppl", "lr": "lr", "seconds": "seconds"}.items():
        assert metrics[f"valid.{name}"]["steps"] == [1, 2]
        assert metrics[f"valid.{name}"]["values"] == [row[column] for row in run.epochs]

    record = stored(programs, "run.json")
    assert (record["status"], record["result"]) == ("COMPLETED", run.result["test_ppl"])
    assert record["artifacts"] == ["kept.pt"]
    assert (record["experiment"]["mainfile"], record["experiment"]["name"]) == (f"{script}.py", script)
    kept = programs.folder / "observed" / "1" / "kept.pt"
    assert kept.read_bytes() == (programs.folder / "kept.pt").read_bytes()
    info = stored(programs, "info.json")
    assert info == {"run_dir": str(programs.folder / "run"), "result": run.result}
    config = stored(programs, "config.json")
    assert config.keys() == (options_of(script).keys() - {"data", "model"}) | {"dataset", "model_type"}
    assert (config["dataset"], config["log_interval"], config["tied"], config["seed"]) == ("corpus", 6, True, 257)
    assert "Traceback" not in done.err


def test_saved_config_gives_the_run_again(programs):
    assert programs.run("main", "save_config", "with", *UPDATES, "lr=3.5").code == 0
    assert programs.run("main", "with", "config.json", "epochs=1").code == 0
    config = read_run(programs.folder / "run").config["options"]
    assert (config["lr"], config["epochs"], config["emsize"]) == (3.5, 1, 8)


def test_a_run_of_sacred_can_be_resumed_with_and_without_it(programs, monkeypatch):
    train(programs, "main", "run_dir=whole", "save=whole.pt")
    whole_run = outcome(programs.folder, "whole", "whole.pt")
    for name, again in {"a": ["with", "resume=a"], "b": ["--resume", "b"]}.items():
        command = ["main", "with", *UPDATES, f"run_dir={name}", f"save={name}.pt"]
        kill_at(programs, 25, *command)
        assert programs.run("main", *again).code == 0
        assert outcome(programs.folder, name, f"{name}.pt") == whole_run


def test_a_resumed_run_may_be_longer_but_not_another(programs):
    train(programs, "main", "epochs=1")
    done = programs.run("main", "with", "resume=run", "lr=5")
    assert done.code == 2
    assert "--resume run with --lr 5.0: the run was started with 20.0" in done.err
    assert "Traceback" not in done.err
    assert programs.run("main", "with", "resume=run", "epochs=2").code == 0
    assert len(read_run(programs.folder / "run").epochs) == 2
    resume(programs, "main", "--epochs", "3")
    assert len(read_run(programs.folder / "run").epochs) == 3


@pytest.mark.parametrize(
    ("started", "resumed", "said"),
    [
        ("epochs=1 max_steps=36", "epochs=40 max_steps=36", ""),  # 40 is the default
        ("epochs=1 tied=False", "tied=True", "--tied True: the run was started with False"),
        ("epochs=1 optimizer=adamw lr=0.01", "optimizer=adamw epochs=2", ""),
        ("epochs=1", "dataset=moved epochs=2", ""),
    ],
)
def test_what_is_asked_of_a_resumed_run_is_what_is_said(programs, started, resumed, said):
    train(programs, "main", *started.split())
    if "moved" in resumed:
        (programs.folder / "moved").mkdir()
        (programs.folder / "corpus").rename(programs.folder / "moved" / "wikitext-2")
    done = programs.run("main", "with", "resume=run", *resumed.split())
    epochs = len(read_run(programs.folder / "run").epochs)
    assert (done.code, epochs, said in done.err) == ((2, 1, True) if said else (0, 2, True)), done.err


def test_the_model_of_another_run_is_no_artifact(programs):
    (programs.folder / "model.safetensors").write_bytes(b"of another run")
    programs.spoil_gradients(set(range(1, 99)), "decoder.bias")
    done = programs.run("main", "with", *UPDATES, "tied=False", "max_skipped=4", "-F", "observed")
    assert (done.code, stored(programs, "run.json")["artifacts"]) == (1, [])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("with seed=4294967296", "--seed 4294967296 below 2**32"),
        ("print_config with seed=high", "--seed 'high' whole"),
        ("with epcohs=3", "'epcohs' did you mean epochs?"),
        ("print_config with epcohs=3", "'epcohs' did you mean epochs?"),
        ("with lr=high", "--lr 'high' above"),
        ("with lr=-1", "--lr '-1' above"),
        ("with epochs=1.5", "--epochs '1.5' whole"),
        ("with tied=maybe", "--tied 'maybe' true false"),
        ("with model_type=lstm", "--model 'lstm' LSTM"),
        ("with nhid=9", "--tied --nhid 9"),
        ("with batch_size=[1,2]", "--batch_size [1, 2] one"),
        ("with nlayer", "with nlayer: neither NAME=VALUE nor"),
        ("with none.json", "with none.json: neither NAME=VALUE nor"),
        ("with lr=3 --epochs 2", "--epochs after with: NAME=VALUE epochs=2"),
        ("with --model=GRU", "--model=GRU after with: model_type=GRU"),
        ("print_confg", "'print_confg' did you mean print_config? there are"),
        ("-x", "-x is no command line of Sacred; --help"),
        ("-F", "-F is no command line of Sacred; see help"),
    ],
)
@pytest.mark.parametrize("script", jobs.mostly_slow(SCRIPTS, "main"))
def test_a_mistake_is_one_line_as_all_others_are(programs, script, words, said):
    error = programs.refuse(script, *words.split(), *(["-F", "observed"] if words.startswith("with") else []))
    assert all(part in error for part in said.split()), error


def test_what_fails_in_the_run_is_one_line_and_recorded_as_failed(programs):
    done = programs.run("main", "with", *UPDATES, "dataset=nowhere", "-F", "observed")
    assert (done.code, "Traceback" in done.err) == (2, False)
    assert re.fullmatch(r"error: --data nowhere: there is no such folder[^\n]+", done.err.splitlines()[-1])
    assert stored(programs, "run.json")["status"] == "FAILED"

    programs.spoil_gradients(set(range(5, 99)), "decoder.bias")
    done = programs.run("main", "with", *UPDATES, "tied=False", "max_skipped=4", "-F", "observed")
    assert (done.code, "Traceback" in done.err) == (1, False)
    assert done.err.splitlines()[-1].startswith("error: ")
    record = json.loads((programs.folder / "observed" / "2" / "run.json").read_text())
    assert record["status"] == "FAILED"
    assert json.loads((programs.folder / "observed" / "2" / "info.json").read_text())["result"]["status"] == "diverged"


def test_an_option_without_effect_is_refused_where_it_is_asked_for(programs):
    """Sacred's configuration has every option, asked for or not."""
    done = programs.run("main", "with", *UPDATES, "tied=False", "init_scale=4")
    assert "--init-scale with main.py, whose loss scale is static" in done.out + done.err + str(done.code)
    assert not (programs.folder / "run").exists()


def test_a_run_that_diverged_in_its_first_epoch_has_no_model(programs):
    """The file at --save is an earlier run's."""
    (programs.folder / MODEL).write_bytes(b"of another run")
    assert programs.run("main", "with", *UPDATES, "tied=False", "lr=1e9", "-F", "observed").code == 1
    assert stored(programs, "run.json")["artifacts"] == []
    assert (programs.folder / MODEL).read_bytes() == b"of another run"


@pytest.mark.parametrize("missing", [["sacred"], ["sacred", "colorama"], ["pkg_resources"]], ids=str)
@pytest.mark.parametrize("words", ["print_config", "with lr=3", "-F observed", "--name=x with lr=3", "help"])
def test_without_sacred_a_line_says_how_to_install_it(programs, monkeypatch, words, missing):
    for name in [name for name in sys.modules if name.partition(".")[0] == "sacred"]:
        monkeypatch.delitem(sys.modules, name)  # so that it is imported anew
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "lm.extras.sacred_front", raising=False)
    monkeypatch.delattr(lm.extras, "sacred_front", raising=False)
    assert "pip install 'roundoff[sacred]'" in programs.refuse("main", *words.split())


def test_colours_are_for_terminals_that_want_them(programs, monkeypatch):
    def out(terminal: bool) -> str:
        monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
        return programs.run("main", "print_config").out

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[2m# columns of text side by side\x1b[0m" in out(terminal=True)
    assert "\x1b" not in out(terminal=False)
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in out(terminal=True)


@pytest.mark.slow
def test_as_a_process_it_is_imported_when_asked_for_and_warns_of_nothing(tmp_path: Path):
    code = (
        "import sys, lm.launch.entry, lm.options.config, main\n"
        "assert not [name for name in sys.modules if name.partition('.')[0] == 'sacred']\n"
        "lm.options.config.parse_args(main.__file__, None, [])\n"
        "assert 'sacred' not in sys.modules\n"
        "sys.argv = ['main.py', 'print_dependencies']\n"
        "lm.launch.entry.run_trainer(main.main, main.__file__, None)\n"
    )
    command = [sys.executable, "-W", "default", "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True
    )
    assert "arn" not in done.stderr
    assert re.search(r"^  sacred +== 0\.8\.\d+$", done.stdout, re.MULTILINE)
    assert re.search(r"^  main.py +[0-9a-f]{32}$", done.stdout, re.MULTILINE)
    assert re.search(r"^  apex_compat/fp16_utils/fp16util.py +[0-9a-f]{32}$", done.stdout, re.MULTILINE)
    assert done.stdout.count("\nM ") + done.stdout.count("\n  git") <= 1
