"""Several processes train what one trains, step by step the same on all of them; and however they end, they end.

`test_faults` disturbs runs of two processes, too. Each start of torchrun itself takes seconds; elsewhere a parent does
what torchrun does with forked processes.
"""

import math
import re
import signal

import pytest
import torch
from torch import distributed as dist

import jobs
from lm.model.model_file import load_model
from lm.training import distributed
from lm.training.checkpoint import DAMAGED, FILE, PREVIOUS
from programs import BATCHES, TINY, read_rows, read_run
from ranks import Ended, torchrun
from runs import Command, outcome, read_one

HALF = ("manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
TOLERANCE = 1e-5
TRAIN = [*TINY, "--checkpoint-interval", "7", "--log-interval", "5", "--dropout", "0.3"]
STOP = {"moment": "backward", "n": BATCHES + 7}


def difference(these, those, key: str) -> float:
    """The largest relative one."""
    pairs = zip(these, those, strict=True)
    return max(abs(this[key] - that[key]) / abs(that[key]) for this, that in pairs)


def read_dumps(folder, name: str, processes: int = 2):
    """What each rank had after each step; see `worker.dump`."""
    return [read_rows(folder / f"{name}-{n}") for n in range(processes)]


EQUAL = {  # -> processes, command; the first two are quick
    "2": (2, ["main"]),
    "4 tied": (4, ["main", "--tied"]),
    "2 GRU": (2, ["main", "--model", "GRU"]),
    "2 tied fp16_optimizer": (2, ["main_fp16_optimizer", "--tied"]),
    "2 in parts": (2, ["main_fp16_optimizer", "--accumulate", "2"]),
    "2 amp": (2, ["main_amp", "--dtype", "float32"]),
}


@pytest.mark.parametrize("case", jobs.mostly_slow(EQUAL, "2", "4 tied"))
def test_several_processes_train_what_one_trains(ranks, request, case):
    """100 steps; with two processes, as a quick check, 36 of them."""
    processes, (script, *flags) = EQUAL[case]
    steps, epochs = (100, 6) if request.config.getoption("--slow") else (2 * BATCHES, 2)
    flags += ["--epochs", epochs, "--max-steps", steps, "--dropout", "0", "--log-interval", "5", "--lr", "2"]
    one = ranks.train(1, script, *flags, name="one")
    several = ranks.train(processes, script, *flags, name="several")
    assert len(one) == steps
    assert 0 < difference(several, one, "loss") < TOLERANCE  # exactly equal they cannot be
    assert difference(several, one, "grad_norm") < TOLERANCE
    for name in ("step", "epoch", "lr", "applied", "loss_scale"):
        assert [row[name] for row in several] == [row[name] for row in one]
    alone, together = read_run(ranks.folder / "one"), read_run(ranks.folder / "several")
    assert len(alone.epochs) == epochs
    assert difference(together.epochs, alone.epochs, "valid_loss") < TOLERANCE
    assert difference([together.result], [alone.result], "test_loss") < TOLERANCE
    assert [run.config["environment"]["processes"] for run in (alone, together)] == [1, processes]
    expected = load_model(ranks.folder / "one.pt")[0].state_dict()
    for name, weight in load_model(ranks.folder / "several.pt")[0].state_dict().items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("processes", jobs.mostly_slow([2, 4], 2))
def test_equal_runs_are_equal_to_the_byte(ranks, processes):
    """With dropout, whose masks are others on each rank. Rank 0 alone writes and speaks."""
    for name in ("a", "b"):
        ranks.train(processes, "main_amp", "--dropout", "0.3", "--log-interval", "5", name=name, dump={"name": name})
    assert outcome(ranks.folder, "a", "a.pt") == outcome(ranks.folder, "b", "b.pt")
    for rows in zip(*read_dumps(ranks.folder, "a", processes), strict=True):
        assert len({row["random"] for row in rows}) == processes
        assert len({row["weights"] for row in rows}) == 1
    written = {f"{name}-{n}" for name in ("a", "b", "out", "err") for n in range(processes)}
    assert {path.name for path in ranks.folder.iterdir()} == {"corpus", "a", "b", "a.pt", "b.pt"} | written
    said = (ranks.folder / "out-0").read_text().splitlines()
    assert sum(line.startswith("| epoch ") for line in said) == 2 * (BATCHES // 5)
    assert sum(line.startswith("| end of epoch ") for line in said) == 2
    assert sum(line.startswith("| End of training ") for line in said) == 1
    assert {(ranks.folder / f"out-{n}").read_text() for n in range(1, processes)} == {""}


@pytest.mark.parametrize("mode", jobs.mostly_slow(HALF, "manual", "fp16-optimizer-dynamic", "amp-fp16"))
def test_all_ranks_skip_together(ranks, mode):
    """Where one of them alone has an inf in a gradient, at the ends of epochs and log intervals too."""
    bad = {"1": [1, 3, 4, BATCHES, 2 * BATCHES], "0": [9, BATCHES + 1]}
    script, *flags = jobs.MODES[mode]
    spoil = {"steps": bad, "parameter": "rnn.weight_hh_l1"}
    flags += ["--log-interval", "5", *jobs.if_dynamic(mode, "--init-scale", "1024", "--scale-window", "6")]
    steps = ranks.train(2, script, *flags, spoil=spoil, dump={"name": "dump"})
    assert [row["step"] for row in steps if not row["applied"]] == sorted(bad["0"] + bad["1"])
    before, scale, good = None, steps[0]["loss_scale"], 0
    for row, mine, other in zip(steps, *read_dumps(ranks.folder, "dump"), strict=True):
        assert mine | {"loss": 0, "random": 0} == other | {"loss": 0, "random": 0}
        assert mine["applied"] is row["applied"]
        assert row["loss"] == pytest.approx((mine["loss"] + other["loss"]) / 2, rel=1e-6)
        assert mine["loss"] != other["loss"]  # each has columns of its own
        now = (mine["weights"], mine["masters"])
        assert before is None or (now == before) is not row["applied"]
        assert row["loss_scale"] == scale
        before, good = now, good + 1 if row["applied"] else 0
        if mode in ("fp16-optimizer-dynamic", "amp-fp16"):
            scale *= 0.5 if not row["applied"] else 2.0 if good % 6 == 0 else 1.0


def means(ranks, gradients: torch.Tensor) -> list[torch.Tensor]:
    """What each rank got for a mean in its first and in its second pass; `gradients` has a row for each."""
    torch.save(gradients, ranks.folder / "gradients")
    ended = ranks.run(len(gradients), "main", average={"gradients": "gradients", "means": "means"})
    assert (set(ended.codes), set(ended.err)) == ({0}, {""}), ended
    return [mean for n in range(len(gradients)) for mean in torch.load(ranks.folder / f"means-{n}")]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("processes", [2, 3, 4])
def test_half_gradients_are_averaged_with_one_rounding(ranks, processes, dtype):
    """Those near the smallest subnormal number too, which DistributedDataParallel itself makes 0 or twice as large."""
    torch.manual_seed(processes)
    smallest = 2.0**-24 if dtype is torch.float16 else 2.0**-133
    counts = torch.cat([torch.randint(-limit, limit + 1, (processes, 1000)) for limit in (1, 3, 100)], 1)
    gradients = (counts.double() * smallest).to(dtype)
    expected = (counts.double().sum(0) / processes).round() * smallest  # to even, as arithmetic rounds
    assert torch.equal(gradients.double(), counts * smallest)
    for mean in means(ranks, gradients):
        assert mean.dtype is dtype
        assert torch.equal(mean.double(), expected)
    by_torch = sum(gradients[n] / processes for n in range(processes))
    assert (by_torch.double() != expected).double().mean() > 0.1


@pytest.mark.parametrize("processes", [2, 3, 4])
def test_half_gradients_of_any_size_are_averaged(ranks, processes):
    """To the same bits on each rank and again; no sum overflows; an inf or nan of one rank reaches all."""
    torch.manual_seed(processes)
    gradients = (torch.randn(processes, 5000) * 2.0 ** torch.randint(-24, 10, (processes, 5000))).half()
    gradients[:, 0] = 65504
    gradients[-1, 1], gradients[0, 2] = torch.inf, torch.nan
    every = means(ranks, gradients) + means(ranks, gradients)
    for each in (every[::2], every[1::2]):  # the first pass decides the order of sums, which is that of the second
        assert len(set(jobs.bits(each))) == 1
    first = every[1]
    exact = gradients.double().mean(0)
    assert (first[0], first[1], first[2].isnan()) == (65504, torch.inf, True)
    error = (first.double() - exact)[3:].abs()
    scale = gradients[:, 3:].double().abs().amax(0)
    assert bool((error <= 2.0**-11 * exact[3:].abs() + 2.0**-25 + 2.0**-22 * scale).all())


@pytest.mark.parametrize("change", jobs.mostly_slow([(1, 2, "LSTM"), (2, 1, "GRU"), (2, 4, "LSTM")], (2, 1, "GRU")))
def test_resumed_with_another_number_of_processes(ranks, change):
    """Without dropout the run is the same, but for the order of sums."""
    before, after, kind = change
    flags = ["--dropout", "0", "--lr", "5", "--model", kind]
    whole = ranks.train(1, "main", *flags, name="whole")
    kill = STOP | {"do": "kill -9", "rank": before - 1}
    ended = ranks.run(before, "main", *TRAIN, *flags, at=kill, patience={})
    assert ended.codes == [1] * (before - 1) + [-9]
    ended = ranks.run(after, "main", "--resume", "run")
    assert (ended.codes, "".join(ended.err)) == ([0] * after, ""), ended
    assert "at epoch 2, step 22\n" in ended.out[0]
    run = read_run(ranks.folder / "run")
    assert run.config["environment"]["processes"] == after
    assert difference(run.steps, whole, "loss") < TOLERANCE
    assert difference(run.epochs, read_run(ranks.folder / "whole").epochs, "valid_loss") < TOLERANCE


@pytest.mark.parametrize("mode", jobs.mostly_slow(("fp32", *HALF), "fp16-optimizer-dynamic"))
@pytest.mark.slow
def test_three_processes_are_resumed_to_the_bit(ranks, mode):
    """Of three terms the order matters, and torch chooses it anew when the run goes on."""
    script, *flags = jobs.MODES[mode]
    flags += ["--dropout", "0.3", "--batch_size", "6", "--nhid", "24", "--checkpoint-interval", "7"]
    whole = ranks.train(3, script, *flags, name="whole")
    kill = {"moment": "backward", "n": 17, "do": "kill -9", "rank": 1}
    ended = ranks.run(3, script, *TINY, *flags, at=kill, patience={})
    assert ended.codes == [1, -signal.SIGKILL, 1]
    assert ranks.run(3, script, "--resume", "run").codes == [0] * 3
    assert read_rows(ranks.folder / "run" / "steps.jsonl") == whole
    assert outcome(ranks.folder, "run") == outcome(ranks.folder, "whole", "whole.pt")


@pytest.mark.slow
def test_resumed_with_another_number_of_processes_and_dropout(ranks):
    """It goes on, with other masks, from the same weights."""
    flags = ["--dropout", "0.3", "--tied"]
    whole = ranks.train(2, "main_amp", *flags, name="whole")
    ranks.run(2, "main_amp", *TRAIN, *flags, at=STOP | {"do": "kill -9"}, patience={})
    assert ranks.run(4, "main_amp", "--resume", "run").codes == [0] * 4
    run = read_run(ranks.folder / "run")
    assert run.steps[:21] == whole[:21]
    assert len(run.steps) == 2 * BATCHES
    assert all(math.isfinite(row["loss"]) for row in run.steps)
    assert run.steps[21:] != whole[21:]


# Ends.


def errors(ended: Ended) -> list[str]:
    """What the processes have to say, without what torchrun adds."""
    return sorted(line for text in ended.err for line in text.splitlines() if line.startswith("error: "))


LOST = "error: cannot go on: no answer from rank {} ("
ENDS = {  # -> what happens to which rank when; exit codes; lines of error, each by its beginning
    "kill -9": (2, STOP, [1, -signal.SIGKILL], [LOST.format(1)]),
    "out of memory": (2, {"moment": "update", "n": 7}, [1, 1], [LOST.format(1), "error: rank 1: not enough memory: "]),
    "mistake": (2, STOP, [1, 70], [LOST.format(1)]),
    "hang": (4, STOP, [1, -signal.SIGKILL, 1, 1], [LOST.format(1)]),
    "SIGTERM": (2, STOP, [143, 143], []),
}


@pytest.mark.parametrize("do", jobs.mostly_slow(ENDS, "kill -9", "out of memory", "mistake", "SIGTERM"))
def test_the_end_of_one_rank_ends_all(ranks, do):
    """In time, and named by one line; only a mistake in the program shows where it is, on its rank."""
    processes, moment, codes, lines = ENDS[do]
    patience = {"timeout": 4, "roll_call": 3} if do == "hang" else {}
    ended = ranks.run(processes, "main", *TRAIN, at=moment | {"do": do, "rank": 1}, patience=patience)
    for code, expected in zip(ended.codes, codes, strict=True):
        assert code in (expected, -signal.SIGTERM), ended  # which the first to end brings upon the others
    assert [line.startswith(start) for line, start in zip(errors(ended), lines, strict=True)] == [True] * len(lines)
    assert ["Traceback" in text for text in ended.err] == [do == "mistake" and n == 1 for n in range(processes)]


@pytest.mark.parametrize("mode", jobs.mostly_slow(["fp32", "manual"], "manual"))
@pytest.mark.slow
def test_kill_9_names_nobody_else(ranks, mode):
    """Neither those that waited for the one that has gone, nor those that waited for them."""
    script, *flags = jobs.MODES[mode]
    ended = ranks.run(4, script, *TRAIN, *flags, at=STOP | {"rank": 2, "do": "kill -9"})
    assert ended.codes == [1, 1, -signal.SIGKILL, 1]
    (line,) = errors(ended)
    assert line.startswith(LOST.format(2))
    assert "--resume" in line
    assert "Traceback" not in "".join(ended.err)


LEAVES = {  # -> what happens to rank 1; whether leaving hangs; exit codes; lines of error, each by its beginning
    "nothing": (None, False, [0, 0], []),
    "SIGTERM": ("SIGTERM", False, [143, 143], []),
    "kill -9": ("kill -9", True, [1, -signal.SIGKILL], [LOST.format(1)]),
    "mistake": ("mistake", True, [1, 70], [LOST.format(1)]),
    "Ctrl-C twice": ("Ctrl-C twice", True, [1, 130], [LOST.format(1)]),
}


@pytest.mark.parametrize("case", jobs.mostly_slow(LEAVES, "kill -9"))
def test_only_those_who_have_all_come_to_the_end_leave_the_group(ranks, case):
    """With nccl, leaving waits for messages under way, and so for ever for a rank that has gone."""
    do, hangs, codes, lines = LEAVES[case]
    fault = {} if do is None else {"at": STOP | {"do": do, "rank": 1}}
    ended = ranks.run(2, "main", *TRAIN, leaving={"hangs": hangs}, patience={"roll_call": 3}, **fault)
    for code, expected in zip(ended.codes, codes, strict=True):
        assert code in (expected, -signal.SIGTERM), ended
    assert [line.startswith(start) for line, start in zip(errors(ended), lines, strict=True)] == [True] * len(lines)
    assert [path.name for path in sorted(ranks.folder.glob("left-*"))] == ([] if hangs else ["left-0", "left-1"])


def test_no_rank_waits_for_others_once_it_has_failed(ranks):
    """Nor for a thread that carries a message to them, which would wait for as long as they hang."""
    ended = ranks.run(2, "main", *TRAIN, leave_alone=STOP | {"moment": "train_step"})
    assert (ended.codes[0] > 0, ended.codes[1]) == (True, 0), ended
    assert "RuntimeError: a kernel failed" in ended.err[0]


@pytest.mark.parametrize("full", [False, True])
def test_an_overflow_that_stays_ends_all(ranks, full):
    """Said once for both; on a full disk, too. The run is not resumed."""
    spoil = {"steps": {"1": list(range(5, 99))}, "parameter": "decoder.bias"}
    fault = {"at": {"moment": "write result.json", "n": 1, "do": "full disk"}} if full else {}
    ended = ranks.run(2, "main_amp", *TINY, "--max-skipped", "4", spoil=spoil, patience={}, **fault)
    assert 1 in ended.codes
    assert set(ended.codes) <= {1, -signal.SIGTERM}
    (line,) = "".join(ended.err).splitlines()
    assert re.match(
        r"error: main_amp.py in mode \S+ has diverged: .* 4 steps in a row, up to step 8, .*decoder.bias", line
    )
    assert [row["applied"] for row in read_rows(ranks.folder / "run" / "steps.jsonl")] == [True] * 4 + [False] * 4
    if not full:
        result = read_run(ranks.folder / "run").result
        assert (result["status"], result["steps"], result["skipped"]) == ("diverged", 8, 4)
        assert "has diverged" in refused(ranks, 2, "--resume", "run", script="main_amp")


@pytest.mark.parametrize(
    ("every", "rank", "moment", "n", "steps"),
    [(1, 1, "backward", 7, 8), (10, 1, "backward", 7, 18), (10, 0, "backward", 11, 27), (10, 1, "evaluation", 1, 27)],
)
def test_sigterm_to_one_rank_ends_all_at_the_same_step(ranks, every, rank, moment, n, steps):
    """At the second message from then on; an epoch asks 21 times: 18 steps, 2 batches of validation, its end."""
    stop = {"moment": moment, "n": n, "do": "SIGTERM", "rank": rank}
    flags = ["--epochs", "3", "--checkpoint-interval", "7", "--dropout", "0.3"]
    ended = ranks.run(2, "main", *TINY, *flags, at=stop, stop_interval={"steps": every}, dump={"name": "dump"})
    assert (ended.codes, errors(ended)) == ([143, 143], []), ended
    assert [len(rows) for rows in read_dumps(ranks.folder, "dump")] == [steps, steps]
    assert read_one(ranks.folder / "run" / FILE)["records"]["steps"] == steps
    assert read_run(ranks.folder / "run").result["status"] == "interrupted"


class Message:
    """Stands for an all-reduce under way."""

    def wait(self) -> None:
        """It has arrived."""


@pytest.mark.parametrize("every", [1, 10])
def test_the_processes_ask_each_other_at_every_tenth_step(monkeypatch, every):
    sent = []
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda value, *_, async_op: sent.append(value.item()) or Message())
    maximum = distributed.Maximum(every)
    answers = [maximum(2 if call > 25 else 0) for call in range(1, 101)]
    assert len(sent) == 100 // every
    assert sum(value == 0 for value in sent) == 25 // every
    assert answers.index(2) + 1 == (27 if every == 1 else 40)
    assert set(answers[answers.index(2) :]) == {2}


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL], ids=lambda number: number.name)
def test_through_torchrun(ranks, number):
    """As a cluster or a user sends a signal: each process gets it, all stop at the same step; or one is killed."""
    killed = number == signal.SIGKILL
    fault = {"at": STOP | {"do": "kill -9", "rank": 1}} if killed else {"signal_torchrun": STOP | {"number": number}}
    ended = torchrun(ranks.folder, "main", *TRAIN, **fault)
    lines = errors(ended)
    if killed:
        assert ended.codes[0] != 0
        assert [line.startswith(LOST.format(1)) for line in lines] == [True]
        assert not (ranks.folder / "run" / "result.json").exists()
        return
    assert lines == []
    interrupted = number == signal.SIGINT
    assert ended.out[0].count("Exiting from training early\n") == interrupted
    assert ended.out[0].count("| End of training | test loss ") == interrupted
    assert ended.out[0].count("| stopped by SIGTERM; to go on: ") == (not interrupted)
    assert ended.out[0].count("| to go on: ") == 2 * interrupted
    run = read_run(ranks.folder / "run")
    assert (run.result["status"], run.result["test_loss"] is None) == ("interrupted", not interrupted)
    assert BATCHES + 7 <= len(run.steps) == run.result["steps"] < 2 * BATCHES
    if not interrupted:
        assert ended.codes[0] != 0
        assert read_one(ranks.folder / "run" / FILE)["records"]["steps"] == len(run.steps)


# Mistakes: what all processes find is said once; where only one finds it, the others do not wait for ever.


def refused(ranks, processes: int, *flags: str, script: str = "main", **faults) -> str:
    """The one line of a command that is a mistake."""
    ended = ranks.run(processes, script, *flags, **faults)
    assert 2 in ended.codes
    assert set(ended.codes) <= {2, -signal.SIGTERM}  # that ends those which have not found it
    assert "".join(ended.out) == ""
    (line,) = "".join(ended.err).splitlines()
    assert re.match(r"error: (?!rank)", line)
    return line


GPU = "with 2 processes on this machine, which has {} GPU"


@pytest.mark.parametrize(
    ("processes", "flags", "gpus", "message"),
    [
        (3, TINY, 0, "--batch_size 4 cannot be divided among 3 processes"),
        (2, [*TINY, "--nonsense"], 0, "--nonsense"),
        (2, [*TINY, "--lr", "x"], 0, "'x' is not"),
        (2, ["--resume", "nothing"], 0, "--resume nothing holds no run"),
        (2, [*TINY, "--cuda"], 0, "no CUDA GPU"),
        (2, [*TINY, "--cuda"], 1, GPU.format(1)),
        (2, [*TINY, "--device=cuda"], 1, GPU.format(1)),
        (2, [*TINY, "--device=cuda:0"], 2, GPU.format(2)),
    ],
)
def test_mistakes_are_said_once(ranks, processes, flags, gpus, message):
    assert message in refused(ranks, processes, *flags, gpus={"count": gpus})
    assert not (ranks.folder / "run").exists()


def test_a_run_directory_that_is_taken(ranks):
    """Only rank 0 looks."""
    ranks.train(2, "main", "--epochs", "1")
    before = outcome(ranks.folder, "run", "run.pt")
    assert "--run-dir run holds a run already" in refused(ranks, 2, *TINY)
    assert outcome(ranks.folder, "run", "run.pt") == before


@pytest.mark.slow
def test_a_damaged_checkpoint(faulty):
    """Both read the one before it, which rank 0 alone puts in its place; without that one, it is said once."""
    job = Command(2, "main", ())
    faulty.undisturbed(job)
    faulty.start(job, at={"moment": "backward", "n": 15, "do": "kill -9"}, patience={})
    newest, previous = faulty.run_dir / FILE, faulty.run_dir / PREVIOUS
    newest.write_bytes(newest.read_bytes()[:1000])
    content = previous.read_bytes()
    previous.unlink()
    assert "cannot be used" in refused(faulty.ranks, 2, "--resume", "run")
    previous.write_bytes(content)
    kill = {"moment": "train_step", "n": 1, "do": "kill -9"}
    ended = faulty.ranks.run(2, "main", "--resume", "run", at=kill, patience={})
    assert ended.out[0].splitlines()[1] == "| going on with run at epoch 2, step 10"
    (faulty.run_dir / DAMAGED).unlink()
    faulty.check(job)
