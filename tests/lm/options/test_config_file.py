"""A --config file says what flags say; whoever gives a flag too is right."""

import json

import pytest

from lm.options.options import make_parser
from programs import SCRIPTS, TINY, Programs, read_run
from runs import kill_at, outcome, resume

every_script = pytest.mark.parametrize("script", SCRIPTS)

CONTENT = """
# paths are relative to the working directory
data = "corpus"
emsize = 8
nhid = 8
batch-size = 4
bptt = 5
epochs = 2
lr = 5
dropout = 0.5
tied = true
fp16 = false
log_interval = 6
"""
SAME = [
    *("--data", "corpus", "--emsize", "8", "--nhid", "8", "--batch-size", "4", "--bptt", "5", "--epochs", "2"),
    *("--lr", "5", "--dropout", "0.5", "--tied", "--log-interval", "6"),
]


def write(programs: Programs, content: str) -> None:
    (programs.folder / "c.toml").write_text(content, encoding="utf-8")


@every_script
def test_a_run_is_the_run_with_the_same_flags(programs, script):
    write(programs, CONTENT)
    assert programs.run(script, *SAME, "--run-dir", "run").code == 0
    done = programs.run(script, "--config", "c.toml", "--run-dir", "file", "--save", "file.pt")
    assert (done.code, done.err) == (0, "")
    assert outcome(programs.folder, "file", "file.pt") == outcome(programs.folder)
    ours, theirs = (read_run(programs.folder / name).config for name in ("run", "file"))
    assert {name for name in ours if ours[name] != theirs[name]} == {"run_dir", "save", "environment"}
    assert ours.keys() == theirs.keys()


@pytest.mark.parametrize("front", [True, False], ids=["before", "after"])
def test_the_command_line_wins(programs, front):
    write(programs, CONTENT)
    flags = ["--lr", "7", "--no-tied", "--nhid", "16", "--fp16", "--epochs=1", "--run-dir", "run"]
    file = ["--config=c.toml"]
    assert programs.run("main", *(file + flags if front else flags + file)).code == 0
    config = read_run(programs.folder / "run").config
    given = {"lr": 7.0, "tied": False, "nhid": 16, "fp16": True, "epochs": 1, "emsize": 8, "dropout": 0.5}
    assert {name: config[name] for name in given} == given
    assert "config" not in config


def test_a_run_from_a_file_can_be_resumed_without_it(programs, monkeypatch):
    write(programs, CONTENT)
    assert programs.run("main", *SAME, "--run-dir", "run").code == 0
    expected = outcome(programs.folder)
    (programs.folder / "run").rename(programs.folder / "whole")
    kill_at(programs, 25, "main", "--config", "c.toml", "--run-dir", "run")
    (programs.folder / "c.toml").unlink()
    resume(programs, "main")
    assert outcome(programs.folder) == expected


def test_a_file_beside_resume_must_agree(programs):
    write(programs, CONTENT)
    assert programs.run("main", *SAME, "--run-dir", "run").code == 0
    write(programs, "epochs = 3\nlr = 5\n")
    assert programs.run("main", "--resume", "run", "--config", "c.toml").code == 0
    assert len(read_run(programs.folder / "run").epochs) == 3
    write(programs, "lr = 6\n")
    assert "--lr 6.0: the run was started with 5.0" in programs.refuse("main", "--resume", "run", "--config", "c.toml")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("epcohs = 3", "'epcohs' mean epochs?"),
        ("log-intervall = 3", "'log-intervall' mean log_interval?"),
        ("zzzz = 3", "'zzzz' there are data, batch_size,"),
        ("[training]\nlr = 1", "'training'"),
        ("help = true", "'help'"),
        ('config = "other.toml"', "'config'"),
        ('lr = "fast"', "argument --lr: 'fast' above"),
        ("epochs = 1.5", "argument --epochs: '1.5' whole"),
        ("lr = true", "argument --lr: 'True'"),
        ("tied = 1", "argument --tied: 1 true false"),
        ('tied = "yes"', "argument --tied: 'yes' true false"),
        ("nhid = [1, 2]", "argument --nhid: [1, 2] one value"),
        ('model = "lstm"', "argument --model: 'lstm' LSTM"),
        ("lr = 1979-05-27", "argument --lr: '1979-05-27'"),
        ("batch-size = 4\nbatch_size = 4", "'batch_size' twice"),
        ("lr = 1\nlr = 2", "no TOML file overwrite"),
        ("lr 1", "no TOML line 1"),
    ],
)
def test_mistakes_in_the_file(programs, content, said):
    write(programs, content)
    error = programs.refuse("main", *TINY, "--config", "c.toml")
    assert error.startswith("error: --config c.toml")
    assert all(part in error for part in said.split()), error


def test_files_that_cannot_be_read(programs):
    assert "--config none.toml: cannot read it (No such file" in programs.refuse("main", "--config", "none.toml")
    assert "--config corpus: cannot read it" in programs.refuse("main", "--config", "corpus")
    (programs.folder / "c.toml").write_bytes(b"\xff\xfe")
    assert "--config c.toml is no TOML file" in programs.refuse("main", "--config", "c.toml")


def test_a_flag_of_another_trainer_is_unknown(programs):
    write(programs, 'dtype = "bfloat16"')
    assert programs.run("main_amp", *TINY, "--dry-run", "--config", "c.toml").code == 0
    assert read_run(programs.folder / "run").config["dtype"] == "bfloat16"
    assert "there is no option 'dtype'" in programs.refuse("main", "--config", "c.toml")


@every_script
def test_every_option_can_stand_in_a_file(programs, script):
    """Each with the value that it has anyway; the file is written from what --help shows."""
    lines = []
    for name, option in make_parser(script, None).options().items():
        example = {"--max-steps": 1, "--checkpoint-interval": 9, "--run-dir": "run", "--dtype": "float16"}
        example |= {"--device": "cpu", "--static-loss-scale": 2, "--optimizer": "sgd", "--lr": 20}
        value = example.get(option.option_strings[0], option.default)
        if value is not None:
            lines.append(f"{name} = {json.dumps(value if isinstance(value, bool | int | float) else str(value))}\n")
    write(programs, "".join(lines))
    flags = ["--config", "c.toml", "--data", "corpus", "--emsize", "8", "--nhid", "8", "--batch-size", "4"]
    assert programs.run(script, *flags).code == 0
    config = read_run(programs.folder / "run").config
    assert len(lines) == len(make_parser(script, None).options()) - 2  # all but --resume and --onnx-export
    assert (config["max_steps"], config["checkpoint_interval"], config["init_scale"]) == (1, 9, 65536.0)


@pytest.mark.slow
def test_compare_takes_the_flags_of_a_file(programs):
    write(programs, CONTENT.replace("fp16 = false", "") + "max_steps = 2\nseed = 5\n")
    words = ["--modes", "fp32", "--out", "out", "--", "--config", "c.toml", "--lr", "3"]
    done = programs.run("compare", *words)
    assert done.code == 0, done
    config = read_run(programs.folder / "out" / "runs" / "fp32-5").config
    assert (config["lr"], config["max_steps"], config["seed"], config["emsize"]) == (3.0, 2, 5, 8)
    for line in ("fp16 = true", "fp16 = false", 'run-dir = "elsewhere"', 'dtype = "float32"'):
        write(programs, line)
        modes = "amp-fp32" if "dtype" in line else "fp32"
        assert "after -- is set by" in programs.refuse("compare", "--modes", modes, "--", "--config", "c.toml")
