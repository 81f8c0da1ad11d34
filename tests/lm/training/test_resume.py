"""What may change when a run is resumed, what may not, and what the run says of it; see `test_faults` for its bits."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import jobs
from lm.training.checkpoint import FILE, moved, read_checkpoint
from programs import BATCHES, MODEL, TINY, Programs, strict_json
from runs import kill_at, outcome, resume, state_bits

FLAGS = [*TINY, "--lr", "30", "--log-interval", "5", "--dropout", "0.3"]


@pytest.fixture
def killed(programs: Programs) -> Programs:
    """With a run of main.py in "run" that was killed in its second and last epoch."""
    kill_at(programs, BATCHES + 7, "main", *FLAGS)
    return programs


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """The outcome of that run when nobody disturbs it, by the first test that needs it."""
    return {}


@pytest.fixture
def whole(programs: Programs, expected: dict[str, Any]) -> dict[str, Any]:
    """The same, with the folder as it was."""
    if not expected:
        assert programs.run("main", *FLAGS).code == 0
        expected.update(outcome(programs.folder))
        shutil.rmtree("run")
        Path(MODEL).unlink()
    return expected


def config() -> dict[str, Any]:
    """What the run's config.json says."""
    return strict_json(Path("run/config.json").read_text())


def test_more_epochs_are_the_longer_run(programs, whole):
    assert programs.run("main", *FLAGS, "--epochs", "1").code == 0
    resume(programs, "main", "--epochs", "2")
    assert outcome(programs.folder) == whole
    assert (config()["job"]["epochs"], config()["environment"]["command"][-2:]) == (2, ["--epochs", "2"])
    Path("run/result.json").unlink()
    resume(programs, "main")  # the flags given at the last time count
    assert outcome(programs.folder) == whole


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *(("fp32", "LSTM"), ("amp-bf16", "LSTM"), ("fp16-optimizer-dynamic", "GRU"), ("amp-fp16", "GRU")),
        *(("manual", "Transformer"), ("amp-bf16", "Transformer"), ("manual", "RNN_TANH")),
        ("amp-fp16", "LSTM --lr-schedule cosine --warmup 30 --optimizer adamw --accumulate 3"),
        pytest.param("manual", "Transformer --warmup 30 --accumulate 3", marks=pytest.mark.slow),
    ],
)
def test_dropout_goes_on_with_the_masks_of_the_run_never_stopped(programs, device, mode, kind):
    """On embeddings and output, and between the two layers, for which cuDNN would draw from a state of its own."""
    script, *flags = jobs.MODES[mode]
    flags += [
        *TINY,
        "--model",
        *kind.split(),
        "--lr",
        "2",
        "--dropout",
        "0.2",
        "--checkpoint-interval",
        "5",
        *jobs.on(device),
    ]
    assert programs.run(script, *flags).code == 0
    expected = outcome(programs.folder), state_bits(Path("run") / FILE)
    shutil.rmtree("run")
    passes = 28 * 3 + 2 if "--accumulate" in kind else 29  # in the second part of step 29, or before it
    kill_at(programs, passes, script, *flags)  # three steps after a checkpoint, in the second epoch
    assert "going on with run at epoch 2, step 26\n" in resume(programs, script).out
    assert (outcome(programs.folder), state_bits(Path("run") / FILE)) == expected


def test_a_run_stays_on_its_kind_of_device(programs, device):
    """A checkpoint holds the generator of one kind, and no other kind has its masks."""
    assert programs.run("main", *FLAGS, "--dry-run", *jobs.on(device)).code == 0
    other = {"cpu": "cuda", "cuda": "cpu"}[device]
    assert f"--device {other}: the run was started with {device}" in programs.refuse(
        "main", "--resume", "run", "--device", other
    )


def test_what_may_change_does_not_matter(whole, killed):
    """Where the run ends, what it shows, and where its files lie now; corpus, model and the run itself were moved."""
    Path("corpus").rename("elsewhere")
    Path(MODEL).unlink()
    Path("run").rename("moved")
    flags = ["--data", "elsewhere", "--save", f"new-{MODEL}", "--log-interval", "2", "--checkpoint-interval", "3"]
    done = killed.run("main", "--resume", "moved", *flags)
    assert (done.code, done.err) == (0, "")
    assert outcome(killed.folder, run="moved", model=f"new-{MODEL}") == whole
    assert not Path(MODEL).exists()


def test_another_run_has_overwritten_the_best_model(whole, killed):
    """--save is the same for every run by default. The best model is that of the first epoch here."""
    losses = [row["valid_loss"] for row in json.loads(whole["epochs"])]
    assert losses[1] > losses[0]
    Path(MODEL).write_bytes(b"of another run")
    resume(killed, "main")
    assert outcome(killed.folder) == whole


ENDS = {  # -> flags of the run, flags to resume it with, what is said
    "epochs": ([], [], "has come to the end that --epochs 2 sets; to go on, give more"),
    "max steps": (["--max-steps", "12"], [], "has come to the end that --max-steps 12 sets; to go on, give more"),
    "more epochs than steps": (
        ["--epochs", "1", "--max-steps", "12"],
        ["--epochs", "2"],
        "has come to the end that --max-steps 12 sets;",
    ),
    "fewer steps left": (["--max-steps", "12"], ["--max-steps", "12"], "has come to the end that --max-steps 12 sets;"),
    "dry run": (["--dry-run"], ["--epochs", "7"], "has come to the end that --dry-run sets; to go on, start a new run"),
    "cosine": (
        ["--max-steps", "12", "--lr-schedule", "cosine"],
        [],
        "has come to the end that --max-steps 12 sets; to go on, start a new run",
    ),
}


@pytest.mark.parametrize("case", ENDS)
def test_where_nothing_is_left_to_do_nothing_is_done(programs, case):
    """It said "going on", took no step, and wrote another length into config.json, with which no run was compared."""
    flags, again, said = ENDS[case]
    assert programs.run("main", *FLAGS, *flags).code == 0
    before = programs.files()
    stamps = {path: path.stat().st_mtime_ns for path in Path().rglob("*")}
    done = resume(programs, "main", *again)
    assert done.out.startswith(f"| nothing to do: the run in run {said}")
    assert done.out.count("\n") == 1
    assert programs.files() == before
    assert {path: path.stat().st_mtime_ns for path in Path().rglob("*")} == stamps


@pytest.mark.parametrize("content", [None, b"of another run"])
def test_the_model_of_a_finished_run_is_written_again_where_it_is_lost(programs, content):
    assert programs.run("main", *FLAGS).code == 0
    before, config = outcome(programs.folder), Path("run/config.json").read_bytes()
    Path(MODEL).unlink() if content is None else Path(MODEL).write_bytes(content)
    assert "| End of training | test loss" in resume(programs, "main").out
    assert outcome(programs.folder) == before
    assert resume(programs, "main", "--save", "elsewhere").out.count("\n") > 1
    assert Path("elsewhere").read_bytes() == before["model"]
    assert Path("run/config.json").read_bytes() == config


def test_fewer_epochs_than_a_run_was_to_have_end_it_and_are_recorded(killed):
    """It has trained for one, and is in the second one."""
    Path("run/result.json").unlink(missing_ok=True)
    kill_at(killed, BATCHES + 1, "main", "--resume", "run", "--epochs", "9")  # in the third epoch
    assert config()["job"]["epochs"] == 9
    assert "| End of training" in resume(killed, "main", "--epochs", "2").out
    assert (config()["job"]["epochs"], len(jobs.rows(Path("run"), "epochs.jsonl"))) == (2, 2)


def test_more_steps_at_the_end_of_an_epoch_are_the_longer_run(programs, whole):
    assert programs.run("main", *FLAGS, "--max-steps", str(BATCHES)).code == 0
    resume(programs, "main", "--max-steps", "99999")
    assert outcome(programs.folder) == whole
    assert (config()["job"]["max_steps"], config()["options"]["max_steps"]) == (99999, 99999)


def test_more_steps_go_on_with_the_next_epoch(programs):
    """The epoch that --max-steps cut short has been validated, and is over."""
    assert programs.run("main", *FLAGS, "--max-steps", "12").code == 0
    assert "going on with run at epoch 2, step 13\n" in resume(programs, "main", "--max-steps", "15").out
    assert [row["epoch"] for row in jobs.rows(Path("run"))] == [1] * 12 + [2] * 3


def test_a_run_that_goes_on_elsewhere_says_so(killed):
    """And its config.json names the new machine; of a run that stays where it was nothing is said."""
    here = config()
    assert "its bits may" not in resume(killed, "main").out
    threads = here["environment"]["threads"]
    elsewhere = here | {"environment": here["environment"] | {"threads": threads + 1, "torch": "1.0\n"}}
    Path("run/config.json").write_text(json.dumps(elsewhere))
    out = resume(killed, "main", "--epochs", "3").out
    line = f"| torch {torch.__version__}, not 1.0\\n, threads {threads}, not {threads + 1}: its bits may be others"
    assert out.splitlines()[1].startswith(line)
    assert config()["environment"] | {"command": []} == here["environment"] | {"command": []}
    assert "its bits may" not in resume(killed, "main", "--epochs", "4").out


GPU = {"device": "A GPU", "torch": "2.11", "threads": 2, "cudnn": "91002", "driver": "550.54.14"}
OLD_GPU = {name: GPU[name] for name in ("device", "torch", "threads")}
CPU = GPU | {"device": "A CPU", "cudnn": None, "driver": None}
MOVES = {  # -> what config.json says, what is so now, what is said of it
    "threads beside a GPU": (GPU | {"threads": 8, "driver": "1.0"}, GPU, ""),
    "cuDNN": (GPU | {"cudnn": "9\n"}, GPU, "cudnn 91002, not 9\\n"),
    "GPU": (GPU | {"device": "B"}, GPU, "device A GPU, not B"),
    "an older record of a GPU": (OLD_GPU | {"threads": 8}, GPU, ""),
    "an older record of another torch": (OLD_GPU | {"torch": "2.6"}, GPU, "torch 2.11, not 2.6"),
    "threads": (CPU | {"threads": 8}, CPU, "threads 2, not 8"),
    "an older record of a CPU": (OLD_GPU | {"device": "A CPU", "threads": 8}, CPU, "threads 2, not 8"),
    "from a CPU to a GPU": (CPU, GPU, "device A GPU, not A CPU"),
    "from a GPU to a CPU": (GPU, CPU, "device A CPU, not A GPU"),
    "odd values": (GPU | {"cudnn": [1], "device": None}, GPU, "device A GPU, not None, cudnn 91002, not [1]"),
    "no mapping": ([], GPU, ""),
}


@pytest.mark.parametrize("case", MOVES)
def test_what_counts_as_another_machine(tmp_path, case):
    before, now, said = MOVES[case]
    (tmp_path / "config.json").write_text(json.dumps({"environment": before}))
    assert moved(tmp_path, {"environment": now}) == said


def test_flags_given_again(killed):
    assert "going on with run at epoch 2, step 19\n" in resume(killed, "main", "--lr", "30", "--seed", "1111").out


def test_what_contradicts_the_run(programs):
    """It is refused in one line, and leaves the run as it is."""
    assert programs.run("main", *FLAGS).code == 0
    Path("empty").mkdir()
    for script, flags, message in (
        ("main", ["--resume", "run", "--lr", "5"], "--lr 5.0: the run was started with 30.0"),
        ("main", ["--resume", "run", "--tied"], "--tied True: the run was started with False"),
        ("main", ["--resume", "run", "--fp16"], "--fp16 True: the run was started with False"),
        ("main", ["--resume", "run", "--batch-size", "8"], "--batch_size 8: the run was started with 4"),
        ("main", ["--resume", "run", "--static-loss-scale", "2"], "2.0: the run was started with the default"),
        ("main", ["--resume", "run", "--run-dir", "other"], "--run-dir other: the run was started with run"),
        ("main", ["--resume", "run", "--epochs", "1"], "has trained for 2 epochs already, and --epochs is 1"),
        ("main", ["--resume", "run", "--max-steps", "35"], "has taken 36 steps already, and --max-steps is 35"),
        ("main", ["--resume", "run", "--data", "python-docs"], "its corpus was another one"),
        ("main", ["--resume", "nowhere"], "holds no run"),
        ("main", ["--resume", "empty"], "holds no run"),
        ("main_amp", ["--resume", "run"], "a run of main, not of main_amp.py"),
        ("main", FLAGS, "--resume run"),
    ):
        assert message in programs.refuse(script, *flags)
    assert read_checkpoint(Path("run")) is not None
