"""However a run of several processes ends, it ends: in time, named by one line, and ready to be resumed."""

import json
import math
import re
import signal

import pytest

from programs import BATCHES, TINY, read_run
from ranks import Ended, torchrun
from runs import outcome

TRAIN = [*TINY, "--checkpoint-interval", "7", "--log-interval", "5", "--dropout", "0.3"]
STOP = {"name": "train_step", "call": BATCHES + 7}


def errors(ended: Ended) -> list[str]:
    """What the processes have to say, without what torchrun adds."""
    return sorted(line for text in ended.err for line in text.splitlines() if line.startswith("error: "))


def check_resumed(ranks) -> None:
    """Once resumed, the run is the one that nobody disturbed."""
    ranks.train(2, "main", *TRAIN, name="whole")
    assert ranks.run(2, "main", "--resume", "run").codes == [0, 0]
    (ranks.folder / "model.safetensors").rename(ranks.folder / "run.pt")
    assert outcome(ranks.folder, "run", "run.pt") == outcome(ranks.folder, "whole", "whole.pt")


# Through torchrun itself. Each start of it takes seconds.


@pytest.mark.slow
def test_sigterm_to_torchrun(ranks):
    """As a cluster sends it: each process gets it, and all stop at the same step."""
    ended = torchrun(ranks.folder, "main", *TRAIN, signal_torchrun=STOP | {"number": signal.SIGTERM})
    assert ended.codes[0] != 0
    assert errors(ended) == []
    assert "| stopped by SIGTERM; to go on: --resume run\n" in ended.out[0]
    result = json.loads((ranks.folder / "run" / "result.json").read_text())
    assert (result["status"], result["test_loss"]) == ("interrupted", None)
    steps = len(read_run(ranks.folder / "run").steps)
    assert BATCHES + 7 <= steps == result["steps"] < 2 * BATCHES
    check_resumed(ranks)


@pytest.mark.slow
def test_ctrl_c_to_torchrun(ranks):
    ended = torchrun(ranks.folder, "main", *TRAIN, signal_torchrun=STOP | {"number": signal.SIGINT})
    assert ended.out[0].count("Exiting from training early\n") == 1
    assert ended.out[0].count("| End of training | test loss ") == 1
    assert errors(ended) == []
    run = read_run(ranks.folder / "run")
    assert run.result["status"] == "interrupted"
    assert math.isfinite(run.result["test_loss"])
    assert BATCHES + 7 <= len(run.steps) == run.result["steps"] < 2 * BATCHES
    assert (ranks.folder / "model.safetensors").exists()


@pytest.mark.slow
def test_kill_9_of_a_rank_under_torchrun(ranks):
    ended = torchrun(ranks.folder, "main", *TRAIN, kill={"rank": 1, **STOP})
    assert ended.codes[0] != 0
    (line,) = errors(ended)
    assert line.startswith("error: cannot go on: no answer from rank 1 (")
    assert "--resume" in line
    assert not (ranks.folder / "run" / "result.json").exists()


# With forked processes, in whose place a parent does what torchrun does.


def test_kill_9_names_nobody_else(ranks):
    """Neither those that waited for the one that has gone, nor those that waited for them."""
    ended = ranks.run(4, "main", *TRAIN, kill={"rank": 2, **STOP})
    assert ended.codes == [1, 1, -signal.SIGKILL, 1]
    (line,) = errors(ended)
    assert line.startswith("error: cannot go on: no answer from rank 2 (")
    assert "Traceback" not in "".join(ended.err)


@pytest.mark.parametrize("name", ["end_epoch", "write_checkpoint"])
def test_an_error_of_one_rank(ranks, name):
    ended = ranks.run(2, "main", *TRAIN, fail={"rank": 1, "name": name, "call": 2, "error": "memory"}, patience={})
    assert ended.codes == [1, 1]
    lost, own = errors(ended)
    assert own == "error: rank 1: not enough memory: you tried to allocate 1 TB"
    assert lost.startswith("error: cannot go on: no answer from rank 1 (")
    assert "Traceback" not in "".join(ended.err)


def test_a_mistake_in_the_program_on_one_rank(ranks):
    """That rank shows where; the others name it."""
    ended = ranks.run(2, "main", *TRAIN, fail={"rank": 1, **STOP, "error": "runtime"}, patience={})
    assert 0 not in ended.codes
    assert "Traceback" in ended.err[1]
    (line,) = ended.err[0].splitlines()
    assert line.startswith("error: cannot go on: no answer from rank 1 (")


def test_no_rank_waits_for_others_once_it_has_failed(ranks):
    """Nor for a thread that carries a message to them, which would wait for as long as they hang."""
    ended = ranks.run(2, "main", *TRAIN, leave_alone=STOP)
    assert (ended.codes[0] > 0, ended.codes[1]) == (True, 0), ended
    assert "RuntimeError: a kernel failed" in ended.err[0]


def test_a_full_disk_on_rank_0(ranks):
    fail = {"rank": 0, "name": "write_checkpoint", "call": 4, "error": "disk"}
    ended = ranks.run(2, "main", *TRAIN, fail=fail, patience={})
    assert ended.codes == [1, 1]
    lost, own = errors(ended)
    assert own.startswith("error: rank 0: cannot write steps.jsonl (No space left on device); all up to the last ")
    assert lost.startswith("error: cannot go on: no answer from rank 0 (")
    assert "Traceback" not in "".join(ended.err)
    check_resumed(ranks)


def test_a_full_disk_when_the_run_has_diverged(ranks):
    """That it has diverged is what is said; the other rank waits for nothing."""
    spoil = {"steps": {"1": list(range(5, 99))}, "parameter": "decoder.bias"}
    fail = {"rank": 0, "name": "write_result", "call": 1, "error": "disk"}
    ended = ranks.run(2, "main", *TRAIN, "--max-skipped", "4", spoil=spoil, fail=fail, patience={})
    assert ended.codes in ([1, 1], [1, -signal.SIGTERM])
    (line,) = errors(ended)
    assert line.startswith("error: main.py in mode fp32 has diverged: ")
    assert "Traceback" not in "".join(ended.err)


@pytest.mark.slow
def test_a_rank_that_hangs(ranks):
    """Stopped dead; what ends it is the parent's SIGKILL, as torchrun's would."""
    hang = {"rank": 0, **STOP, "number": signal.SIGSTOP}
    ended = ranks.run(4, "main", *TRAIN, kill=hang, patience={"timeout": 4, "roll_call": 3})
    assert ended.codes[0] == -signal.SIGKILL
    assert 0 not in ended.codes
    (line,) = errors(ended)
    assert line.startswith("error: cannot go on: no answer from rank 0 (")


def test_sigterm_to_one_rank_stops_all(ranks):
    ended = ranks.run(2, "main", *TRAIN, kill={"rank": 1, **STOP, "number": signal.SIGTERM})
    assert 143 in ended.codes
    assert set(ended.codes) <= {143, -signal.SIGTERM}
    assert ended.err == ["", ""]


# Mistakes: what all processes find is said once; where only one finds it, the others do not wait for ever.


def refused(ranks, processes: int, *flags: str, **faults) -> str:
    ended = ranks.run(processes, "main", *flags, **faults)
    assert 2 in ended.codes
    assert set(ended.codes) <= {2, -signal.SIGTERM}  # that ends those which have not found it
    assert "".join(ended.out) == ""
    (line,) = "".join(ended.err).splitlines()
    assert re.match(r"error: (?!rank)", line)
    return line


def test_a_batch_that_cannot_be_divided(ranks):
    line = refused(ranks, 3, *TINY)
    assert "--batch_size 4 cannot be divided among 3 processes" in line
    assert not (ranks.folder / "run").exists()


def test_a_flag_that_no_trainer_has(ranks):
    assert "--nonsense" in refused(ranks, 2, *TINY, "--nonsense")
    assert "'x' is not" in refused(ranks, 2, *TINY, "--lr", "x")


@pytest.mark.parametrize("device", ["--cuda", "--device=cuda", "--device=cuda:0"])
def test_a_gpu_for_each_process(ranks, device):
    gpus = {"count": 2 if device == "--device=cuda:0" else 1}
    line = refused(ranks, 2, *TINY, device, gpus=gpus)
    assert f"with 2 processes on this machine, which has {gpus['count']} GPU" in line
    assert "no CUDA GPU" in refused(ranks, 2, *TINY, device, gpus={"count": 0})


def test_a_run_directory_that_is_taken(ranks):
    """Only rank 0 looks."""
    ranks.train(2, "main")
    before = outcome(ranks.folder, "run", "run.pt")
    assert "--run-dir run holds a run already" in refused(ranks, 2, *TINY)
    assert outcome(ranks.folder, "run", "run.pt") == before


def test_no_run_to_resume(ranks):
    assert "--resume nothing holds no run" in refused(ranks, 2, "--resume", "nothing")


def test_a_damaged_checkpoint(ranks):
    """Both read the one before it, which rank 0 alone puts in its place; without that one, it is said once."""
    ranks.run(2, "main", *TRAIN, kill={"rank": 0, **STOP}, patience={})
    checkpoint = ranks.folder / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    previous = ranks.folder / "run" / "checkpoint.previous.safetensors"
    content = previous.read_bytes()
    previous.unlink()
    assert "cannot be used" in refused(ranks, 2, "--resume", "run")
    previous.write_bytes(content)
    check_resumed(ranks)
