"""Several processes train what one process trains, step by step the same on all of them."""

import math
import signal

import pytest
import torch

import jobs
from checkpoints import saved_weights
from programs import BATCHES, TINY, read_rows, read_run, strict_json
from runs import outcome

FP32 = {"main": ["main"], "fp16_optimizer": ["main_fp16_optimizer"], "amp": ["main_amp", "--dtype", "float32"]}
HALF = {
    name: jobs.MODES[name] for name in ("manual", "fp16-optimizer", "fp16-optimizer-dynamic", "amp-fp16", "amp-bf16")
}
every_half_mode = pytest.mark.parametrize("mode", HALF)
HUNDRED = ["--epochs", "6", "--max-steps", "100", "--dropout", "0", "--log-interval", "5", "--lr", "2"]
TOLERANCE = 1e-5


def difference(these, those, key: str) -> float:
    """The largest relative one."""
    pairs = zip(these, those, strict=True)
    return max(abs(this[key] - that[key]) / abs(that[key]) for this, that in pairs)


def read_dumps(folder, name: str, processes: int = 2):
    """What each rank had after each step; see `rank.dump`."""
    return [read_rows(folder / f"{name}-{n}") for n in range(processes)]


def check_equal_to_one(ranks, processes: int, script: str, *flags: str) -> None:
    one = ranks.train(1, script, *HUNDRED, *flags, name="one")
    several = ranks.train(processes, script, *HUNDRED, *flags, name="several")
    assert len(one) == 100
    assert 0 < difference(several, one, "loss") < TOLERANCE  # exactly equal they cannot be
    assert difference(several, one, "grad_norm") < TOLERANCE
    for name in ("step", "epoch", "lr", "applied", "loss_scale"):
        assert [row[name] for row in several] == [row[name] for row in one]

    alone, together = read_run(ranks.folder / "one"), read_run(ranks.folder / "several")
    assert len(alone.epochs) == 6
    assert difference(together.epochs, alone.epochs, "valid_loss") < TOLERANCE
    assert difference([together.result], [alone.result], "test_loss") < TOLERANCE
    assert (alone.config["processes"], together.config["processes"]) == (1, processes)
    expected = saved_weights(ranks.folder / "one.pt")
    for name, weight in saved_weights(ranks.folder / "several.pt").items():
        torch.testing.assert_close(weight, expected[name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", jobs.mostly_slow(["LSTM", "tied"], "LSTM"))
@pytest.mark.parametrize("mode", jobs.mostly_slow(FP32, "main"))
def test_two_processes_train_what_one_trains(ranks, mode, kind):
    check_equal_to_one(ranks, 2, *FP32[mode], *(["--tied"] if kind == "tied" else []))


@pytest.mark.parametrize(("processes", "flags"), [(4, ["--tied"]), (2, ["--model", "GRU"])], ids=["4", "GRU"])
def test_more_processes_and_other_models(ranks, processes, flags):
    check_equal_to_one(ranks, processes, "main", *flags)


def test_only_rank_0_writes_and_speaks(ranks):
    ranks.train(2, "main", "--log-interval", "5")
    assert {path.name for path in ranks.folder.iterdir()} == {
        *("corpus", "run", "run.pt"),
        *("out-0", "out-1", "err-0", "err-1"),
    }
    said = (ranks.folder / "out-0").read_text().splitlines()
    assert sum(line.startswith("| epoch ") for line in said) == 2 * (BATCHES // 5)
    assert sum(line.startswith("| end of epoch ") for line in said) == 2
    assert sum(line.startswith("| End of training ") for line in said) == 1
    assert (ranks.folder / "out-1").read_text() == ""


@pytest.mark.parametrize("processes", jobs.mostly_slow([2, 4], 2))
def test_equal_runs_are_equal_to_the_byte(ranks, processes):
    """With dropout, whose masks are others on each rank."""
    for name in ("a", "b"):
        ranks.train(processes, "main_amp", "--dropout", "0.3", name=name, dump={"name": f"{name}.dump"})
    assert outcome(ranks.folder, "a", "a.pt") == outcome(ranks.folder, "b", "b.pt")
    for rows in zip(*read_dumps(ranks.folder, "a.dump", processes), strict=True):
        assert len({row["random"] for row in rows}) == processes
        assert len({row["weights"] for row in rows}) == 1


@every_half_mode
def test_all_ranks_skip_together(ranks, mode):
    """Where one of them alone has an inf in a gradient, at the ends of epochs and log intervals too."""
    bad = {"1": [1, 3, 4, BATCHES, 2 * BATCHES], "0": [9, BATCHES + 1]}
    expected = sorted(bad["0"] + bad["1"])
    script, *flags = HALF[mode]
    spoil = {"steps": bad, "parameter": "rnn.weight_hh_l1"}
    flags += ["--log-interval", "5", "--init-scale", "1024", "--scale-window", "6"]
    steps = ranks.train(2, script, *flags, spoil=spoil, dump={"name": "dump"})
    first, second = read_dumps(ranks.folder, "dump")
    assert [row["step"] for row in steps if not row["applied"]] == expected

    before = None
    for row, mine, other in zip(steps, first, second, strict=True):
        assert mine | {"loss": 0, "random": 0} == other | {"loss": 0, "random": 0}
        assert mine["applied"] is row["applied"]
        assert row["loss"] == pytest.approx((mine["loss"] + other["loss"]) / 2, rel=1e-6)
        assert mine["loss"] != other["loss"]  # each has columns of its own
        now = (mine["weights"], mine["masters"])
        assert before is None or (now == before) is not row["applied"]
        before = now

    scale, good = steps[0]["loss_scale"], 0
    for row in steps:
        assert row["loss_scale"] == scale
        good = good + 1 if row["applied"] else 0
        if mode in ("fp16-optimizer-dynamic", "amp-fp16"):
            scale *= 0.5 if not row["applied"] else 2.0 if good % 6 == 0 else 1.0


@pytest.mark.parametrize("mode", ["manual", "fp16-optimizer-dynamic", "amp-fp16"])
def test_an_overflow_that_stays_ends_all(ranks, mode):
    script, *flags = HALF[mode]
    spoil = {"steps": {"1": list(range(5, 99))}, "parameter": "decoder.bias"}
    ended = ranks.run(2, script, *TINY, *flags, "--max-skipped", "4", spoil=spoil)
    assert 1 in ended.codes
    assert set(ended.codes) <= {1, -signal.SIGTERM}  # which the first to end brings upon the others
    (line,) = "".join(ended.err).splitlines()  # once for both
    assert line.startswith("error: ")
    assert "4 steps in a row, up to step 8, " in line
    assert "decoder.bias" in line
    run = read_run(ranks.folder / "run")
    assert [row["applied"] for row in run.steps] == [True] * 4 + [False] * 4
    assert (run.result["status"], run.result["steps"], run.result["skipped"]) == ("diverged", 8, 4)
    refused = ranks.run(2, script, "--resume", "run")
    assert 2 in refused.codes
    assert ["has diverged" in line for line in "".join(refused.err).splitlines()] == [True]


def config(ranks):
    return strict_json((ranks.folder / "run" / "config.json").read_text())


def killed(ranks, processes: int, script: str, *flags: str) -> None:
    """A run that kill -9 ends at step 25, after a checkpoint at step 21."""
    kill = {"rank": processes - 1, "name": "train_step", "call": 25, "number": signal.SIGKILL}
    ended = ranks.run(processes, script, *TINY, "--checkpoint-interval", "7", *flags, kill=kill, patience={})
    assert ended.codes == [1] * (processes - 1) + [-9]


def resume(ranks, processes: int, script: str) -> None:
    ended = ranks.run(processes, script, "--resume", "run")
    assert (ended.codes, "".join(ended.err)) == ([0] * processes, ""), ended
    assert "at epoch 2, step 22\n" in ended.out[0]
    assert ended.out[1:] == [""] * (processes - 1)


@pytest.mark.parametrize(
    ("processes", "mode", "flags"),
    [
        (2, "fp16-optimizer-dynamic", ["--tied"]),
        (4, "fp32", ["--model", "GRU"]),
    ],
)
def test_resumed_it_is_the_same_run(ranks, processes, mode, flags):
    script, *flags = *jobs.MODES[mode], *flags, "--dropout", "0.3", "--scale-window", "4"
    ranks.train(processes, script, *flags, name="whole")
    killed(ranks, processes, script, *flags)
    resume(ranks, processes, script)
    assert outcome(ranks.folder) == outcome(ranks.folder, "whole", "whole.pt")


@pytest.mark.parametrize(("before", "after", "kind"), [(1, 2, "LSTM"), (2, 1, "GRU"), (2, 4, "LSTM")])
def test_resumed_with_another_number_of_processes(ranks, before, after, kind):
    flags = ["--dropout", "0", "--lr", "5", "--model", kind]
    whole = ranks.train(1, "main", *flags, name="whole")
    killed(ranks, before, "main", *flags)
    assert config(ranks)["processes"] == before
    resume(ranks, after, "main")
    run = read_run(ranks.folder / "run")
    assert run.config["processes"] == after
    assert difference(run.steps, whole, "loss") < TOLERANCE
    assert difference(run.epochs, read_run(ranks.folder / "whole").epochs, "valid_loss") < TOLERANCE


@pytest.mark.slow
def test_resumed_with_another_number_of_processes_and_dropout(ranks):
    """It goes on, with other masks, from the same weights."""
    flags = ["--dropout", "0.3", "--tied"]
    whole = ranks.train(2, "main_amp", *flags, name="whole")
    killed(ranks, 2, "main_amp", *flags)
    resume(ranks, 4, "main_amp")
    run = read_run(ranks.folder / "run")
    assert run.steps[:21] == whole[:21]
    assert len(run.steps) == 2 * BATCHES
    assert all(math.isfinite(row["loss"]) for row in run.steps)
    assert run.steps[21:] != whole[21:]
