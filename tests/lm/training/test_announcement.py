"""What a trainer says before and after training; its commands are run as they stand there."""

import re
import shlex
import signal

import pytest

from jobs import mostly_slow
from programs import BATCHES, HALF, SCRIPTS, TINY, Programs, read_run
from runs import act_at

MODES = {
    "main": "manual: float16 products, float16 weights with float32 masters, loss scale 128",
    "main_fp16_optimizer": "fp16-optimizer-dynamic: float16 products, float16 weights with float32 masters, "
    "dynamic loss scale from 65536 on",
    "main_amp": "amp-fp16: float16 products, float32 weights, dynamic loss scale from 65536 on",
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_before_training(programs, script) -> None:
    run = programs.train(script, *HALF[script])
    mode, device, model, data, records, *_ = run.out.splitlines()
    assert mode == f"| mode: {MODES[script]}"
    assert device == f"| device: cpu ({run.config['environment']['device']}, threads used: 1)"
    assert model == f"| model: LSTM, {run.config['parameters']:,} parameters"
    assert data == "| data: corpus, 359 words to train on, 18 different ones"
    assert records == "| records go to run, the best model to model.safetensors"


def test_a_model_of_an_earlier_run_is_not_replaced_without_a_word(programs) -> None:
    said = "the best model to model.safetensors, where it replaces an earlier one"
    assert said not in programs.train("main", "--dry-run").out
    assert said in programs.train("main", "--dry-run", name="b").out
    assert said not in programs.run("main", "--resume", "run").out, "it is the run's own"


def test_a_warmup_that_is_longer_than_the_run_is_named(programs) -> None:
    said = "| the warm-up of 3 steps does not end in 2 steps\n"
    assert said in programs.train("main", "--warmup", "3", "--max-steps", "2").out
    assert "does not end" not in programs.train("main", "--warmup", "2", "--max-steps", "2", name="b").out


def commands(out: str) -> dict[str, list[str]]:
    """Return what a command is for -> its words."""
    found = re.findall(r"^\| (to [a-z ]+): python (.*)$", out, re.M)
    return {what: shlex.split(command) for what, command in found}


def follow(programs: Programs, words: list[str]) -> str:
    done = programs.run(words[0].removesuffix(".py"), *words[1:])
    assert (done.code, done.err) == (0, "")
    return done.out


@pytest.mark.parametrize("script", mostly_slow(SCRIPTS, "main_fp16_optimizer"))
def test_the_commands_of_a_run_that_has_ended_can_be_copied(programs, script) -> None:
    run = programs.train(script, name="a run")
    assert "| the best model is in model.safetensors, the records are in a run\n" in run.out
    found = commands(run.out)
    assert list(found) == ["to write text", "to train on", "to compare it with another run"]
    assert "| 1000 words are in generated.txt" in follow(programs, found["to write text"])
    follow(programs, found["to train on"])
    assert len(read_run(programs.folder / "a run").epochs) == 4
    assert found["to compare it with another run"] == ["compare.py", "a run", "RUN_DIR"]


ENDS = {  # flags of a run with 2 epochs -> those that are said to train on, and how many steps it has then
    "--max-steps 3": ("--max-steps 6", 6),
    f"--max-steps {BATCHES}": (f"--max-steps {2 * BATCHES}", 2 * BATCHES),
    f"--max-steps {BATCHES + 2}": (f"--epochs 4 --max-steps {2 * BATCHES + 4}", 2 * BATCHES + 4),
    f"--max-steps {2 * BATCHES}": (f"--epochs 4 --max-steps {4 * BATCHES}", 4 * BATCHES),
    "--epochs 1 --max-steps 99": ("--epochs 2", 2 * BATCHES),
    "--epochs 1 --lr-schedule constant": ("--epochs 2", 2 * BATCHES),
    "--dry-run": (None, 1),
    "--max-steps 3 --lr-schedule cosine": (None, 3),
}
QUICK = (
    "--max-steps 3",
    f"--max-steps {BATCHES + 2}",
    "--epochs 1 --max-steps 99",
    "--max-steps 3 --lr-schedule cosine",
)


@pytest.mark.parametrize("flags", mostly_slow(ENDS, *QUICK))
def test_how_to_train_on_is_what_moves_the_end_of_the_run(programs, flags) -> None:
    said, steps = ENDS[flags]
    found = commands(programs.train("main", *flags.split()).out)
    assert ("to train on" in found) is (said is not None)
    if said is not None:
        assert found["to train on"] == ["main.py", "--resume", "run", *said.split()]
        follow(programs, found["to train on"])
    assert len(read_run(programs.folder / "run").steps) == steps


@pytest.mark.parametrize("script", SCRIPTS)
def test_ctrl_c_says_how_to_go_on(programs, script) -> None:
    """At once, since the test that follows may take long, and at the end."""
    with act_at(7, lambda: signal.raise_signal(signal.SIGINT)):
        done = programs.run(script, *TINY)
    line = f"| to go on: python {script}.py --resume run\n"
    assert f"Exiting from training early\n{line}" in done.out
    assert done.out.count(line) == 2
    follow(programs, commands(done.out)["to go on"])
    assert read_run(programs.folder / "run").result["status"] == "finished"
