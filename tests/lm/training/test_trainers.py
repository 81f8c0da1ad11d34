"""The three trainers, from the command line to what they print and leave behind."""

import math
import re

import pytest
import torch

import lm.training.loop
import roundoff
from checkpoints import saved_weights
from lm.model.model_file import load_model
from programs import BATCHES, HALF, SCRIPTS, TINY, TOKENS, Run, read_run

every_script = pytest.mark.parametrize("script", SCRIPTS)
every_half = pytest.mark.parametrize(("script", "flags"), [(s, HALF[s]) for s in SCRIPTS], ids=SCRIPTS)

# The forms are those of the example lines; people's scripts parse them.
LOG_LINE = "| epoch {:3d} | {:5d}/{:5d} batches | lr {:.2f} | ms/batch MS | loss {:5.2f} | ppl {:8.2f}"
EPOCH_LINE = "| end of epoch {:3d} | time: SECONDSs | valid loss {:5.2f} | valid ppl {:8.2f}"
END_LINE = "| End of training | test loss {:5.2f} | test ppl {:8.2f}"
TIMES = ((r"(?<=ms/batch )(\d{2,}| \d)\.\d\d(?= \|)", "MS"), (r"(?<=time: )(\d{2,}| \d)\.\d\d(?=s \|)", "SECONDS"))


def lines_without_times(out: str) -> list[str]:
    """The lines that scripts parse, with the times masked, which no test can foretell."""
    for pattern, name in TIMES:
        out = re.sub(pattern, name, out)
    return [line for line in out.splitlines() if line.startswith(("| epoch", "| end of epoch", "| End of training"))]


def expected_lines(run: Run, log_interval: int) -> list[str]:
    """What a trainer has to print, rebuilt from its records."""
    lines = []
    for epoch in run.epochs:
        rows = [row for row in run.steps if row["epoch"] == epoch["epoch"]]
        for end in range(log_interval, len(rows) + 1, log_interval):
            mean = math.fsum(row["loss"] for row in rows[end - log_interval : end]) / log_interval
            lines.append(LOG_LINE.format(epoch["epoch"], end, BATCHES, epoch["lr"], mean, math.exp(mean)))
        lines.append(EPOCH_LINE.format(epoch["epoch"], epoch["valid_loss"], epoch["valid_ppl"]))
    return [*lines, END_LINE.format(run.result["test_loss"], run.result["test_ppl"])]


def test_the_forms_are_those_of_the_documented_lines():
    documented = (
        "| epoch   1 |   200/ 2983 batches | lr 20.00 | ms/batch 230.10 | loss  7.09 | ppl  1205.43\n"
        "| end of epoch   1 | time: 701.25s | valid loss  5.55 | valid ppl   258.35\n"
        "| End of training | test loss  5.46 | test ppl   235.71\n"
    )
    assert lines_without_times(documented) == [
        LOG_LINE.format(1, 200, 2983, 20.0, 7.09, 1205.43),
        EPOCH_LINE.format(1, 5.55, 258.35),
        END_LINE.format(5.46, 235.71),
    ]


def test_the_last_batch_is_the_last_of_those_counted(programs):
    """It is short, and was no part of the count: the line said 18/ 17."""
    lines = [line for line in programs.train("main", "--log-interval", "1").out.splitlines() if "batches" in line]
    assert [line.split("|")[2].strip() for line in lines] == 2 * [f"{n}/{18:5d} batches" for n in range(1, BATCHES + 1)]


@pytest.mark.parametrize("half", [False, True], ids=["default", "half"])
@every_script
def test_a_run_prints_and_records_the_same(programs, script, half):
    run = programs.train(script, "--epochs", "2", "--log-interval", "6", *(HALF[script] if half else []))

    assert lines_without_times(run.out) == expected_lines(run, 6)
    assert "\r" not in run.out

    assert [row["step"] for row in run.steps] == list(range(1, 2 * BATCHES + 1))
    assert [row["epoch"] for row in run.steps] == [1] * BATCHES + [2] * BATCHES
    for row in run.steps:
        assert list(row) == ["step", "epoch", "loss", "grad_norm", "loss_scale", "applied", "lr"]
        assert row["applied"] is True
        assert all(isinstance(row[key], float) for key in ("loss", "grad_norm", "loss_scale", "lr"))
        assert 0 < row["loss"] < 10
        assert 0 < row["grad_norm"] < 10

    assert [row["epoch"] for row in run.epochs] == [1, 2]
    for row in run.epochs:
        assert list(row) == ["epoch", "valid_loss", "valid_ppl", "lr", "seconds"]
        assert row["valid_ppl"] == math.exp(row["valid_loss"])
        assert row["seconds"] > 0
        assert {step["lr"] for step in run.steps if step["epoch"] == row["epoch"]} == {row["lr"]}

    result = run.result
    assert set(result) == {
        *("status", "test_loss", "test_ppl", "steps", "skipped"),
        *("tokens_per_second", "peak_memory_bytes"),
    }
    assert (result["status"], result["steps"], result["skipped"]) == ("finished", len(run.steps), 0)
    assert result["test_ppl"] == math.exp(result["test_loss"])
    assert result["tokens_per_second"] > 0
    # Every token of the 88 rows that have a successor, twice; validation takes the rest of `seconds`.
    assert result["tokens_per_second"] * sum(row["seconds"] for row in run.epochs) > 2 * 88 * 4
    assert isinstance(result["peak_memory_bytes"], int)
    assert 2**26 < result["peak_memory_bytes"] < 2**36


@every_script
def test_files_left(programs, script):
    before = programs.files()
    programs.train(script, "--epochs", "1")
    new = programs.files().keys() - before.keys()
    assert new == {
        "model.safetensors",
        "run",
        *(f"run/{n}" for n in ("config.json", "steps.jsonl", "epochs.jsonl", "result.json")),
        "run/checkpoint.safetensors",
    }
    model, vocabulary = load_model(programs.folder / "model.safetensors")
    assert len(vocabulary) == 18
    assert vocabulary[:8] == ["the", "cat", "sat", "on", "mat", ".", "<eos>", "a"]
    assert model.encoder.weight.shape == (24, 8)


@every_script
def test_config_says_what_ran(programs, script):
    flags = [*TINY, "--dry-run", *HALF[script], "--lr", "7.5", "--clip", "inf", "--save", "best.pt"]
    assert programs.run(script, *flags).code == 0
    config = read_run(programs.folder / "run").config

    options, precision, environment = config["options"], config["precision"], config["environment"]
    assert (options["lr"], options["clip"], options["save"]) == (7.5, "inf", "best.pt")
    assert (options["script"], options["device"], config["seed"]) == (script, "cpu", 1111)
    assert (config["job"]["lr"], config["job"]["emsize"], config["job"]["dry_run"]) == (7.5, 8, True)
    assert precision["mode"] == {"main": "manual", "main_amp": "amp-fp16"}.get(script, "fp16-optimizer-dynamic")
    equals = {"main": ["manual", "fp16-optimizer"], "main_amp": []}
    assert precision["equals"] == equals.get(script, ["fp16-optimizer-dynamic", "apex-o2"])
    assert (precision["dtype"], precision["loss_scale"]) == ("float16", 128.0 if script == "main" else None)
    assert environment["device"]
    assert environment["torch"] == torch.__version__
    assert re.fullmatch(r"3\.\d+\.\d+\S*", environment["python"])
    assert environment["roundoff"] == roundoff.__version__
    assert environment["git_commit"] is None or re.fullmatch("[0-9a-f]{40}", environment["git_commit"])
    assert environment["command"] == [f"{script}.py", *flags]
    assert (environment["processes"], environment["tf32"]) == (1, False)
    assert (environment["cudnn"], environment["driver"]) == (None, None)
    corpus = config["job"]["corpus"]
    assert corpus.pop("sha256").keys() == {"train", "valid", "test"}
    assert config["corpus"] == "corpus"
    assert corpus == {"words": 18, "vocab_size": 24, **TOKENS}
    layers = 2 * (4 * 8 * (8 + 8 + 2))
    assert config["parameters"] == 24 * 8 + layers + 8 * 24 + 24


@every_half
def test_half_is_half(programs, script, flags):
    """What config.json says is what the layers saw in training, not only in the trial before it."""
    seen = {"hidden": set(), "gradients": set()}

    def watch(model):
        model.rnn.register_forward_hook(lambda rnn, inputs, outputs: seen["hidden"].add(outputs[0].dtype))
        model.rnn.weight_hh_l0.register_hook(lambda gradient: seen["gradients"].add(gradient.dtype))

    programs.before_training(watch)
    run = programs.train(script, "--dry-run", *flags)
    amp = script == "main_amp"  # autocast keeps the weights, and so their gradients, in fp32
    assert run.config["precision"]["dtypes"] == {
        "weights": "float32" if amp else "float16",
        "master_weights": "float32",
        "hidden": "float16",
        "logits": "float16",
        "loss": "float32",
        "gradients": "float32" if amp else "float16",
    }
    assert seen == {"hidden": {torch.float16}, "gradients": {torch.float32 if amp else torch.float16}}
    saved = saved_weights(programs.folder / "model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32 if amp else torch.float16}


@every_script
def test_fp32_is_fp32(programs, script):
    run = programs.train(script, "--dry-run", *(["--dtype", "float32"] if script == "main_amp" else []))
    assert set(run.config["precision"]["dtypes"].values()) == {"float32"}
    assert run.steps[0]["loss_scale"] == 1.0


@every_script
def test_dry_run_is_one_batch_of_each(programs, script, monkeypatch):
    evaluations = []
    evaluate = lm.training.loop.evaluate

    def count(model, precision, source, *rest):
        hook = model.rnn.register_forward_hook(lambda *_: evaluations.append(len(source)))
        try:
            return evaluate(model, precision, source, *rest)
        finally:
            hook.remove()

    monkeypatch.setattr(lm.training.loop, "evaluate", count)
    run = programs.train(script, "--dry-run")
    assert (len(run.steps), len(run.epochs), run.result["status"]) == (1, 1, "finished")
    assert evaluations == [10, 8]
    assert lines_without_times(run.out)[-1].startswith("| End of training | test loss ")


@pytest.mark.parametrize(("steps", "epochs"), [(1, 1), (BATCHES, 1), (BATCHES + 1, 2), (2 * BATCHES, 2)])
@every_script
def test_max_steps(programs, script, steps, epochs):
    run = programs.train(script, "--max-steps", str(steps))
    assert (len(run.steps), run.result["steps"], len(run.epochs)) == (steps, steps, epochs)
    assert run.result["status"] == "finished"
    assert lines_without_times(run.out) == expected_lines(run, 200)


def test_epochs_end_a_run_before_max_steps(programs):
    assert len(programs.train("main", "--epochs", "1", "--max-steps", "1000").steps) == BATCHES


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_other_schedules_heed_no_validation(programs, schedule, monkeypatch):
    """A cosine falls over all epochs. The rate of an epoch is that of its last step."""
    losses = iter([5.0, 6.0, 7.0, 5.0])
    monkeypatch.setattr(lm.training.loop, "evaluate", lambda *_: next(losses))
    run = programs.train("main", "--epochs", "3", "--lr", "16", "--lr-schedule", schedule)
    half_turns = [step / (3 * BATCHES) if schedule == "cosine" else 0.0 for step in range(3 * BATCHES)]
    assert [row["lr"] for row in run.steps] == pytest.approx([16 * math.cos(math.pi / 2 * t) ** 2 for t in half_turns])
    assert [row["lr"] for row in run.epochs] == [row["lr"] for row in run.steps[BATCHES - 1 :: BATCHES]]


def test_the_job_names_a_schedule_that_is_not_the_default(programs):
    """So that a run is compared with those from before there was a choice. The length of a cosine changes its steps."""
    job = programs.train("main", "--dry-run").config["job"]
    assert not {"lr_schedule", "warmup"} & job.keys()
    flags = ["--dry-run", "--lr-schedule", "cosine", "--warmup", "3", "--accumulate", "2"]
    config = programs.train("main", *flags, name="b").config
    assert config["job"] == job | {"lr_schedule": "cosine", "warmup": 3}
    assert (config["length"], config["environment"]["accumulate"]) == ([], 2)


@every_half
def test_lr_is_divided_by_4_when_validation_does_not_improve(programs, script, flags, monkeypatch):
    """The best model, not the last, is saved and tested; an equal loss is no improvement."""
    scripted = iter([5.0, 4.0, 4.0, 4.5, 3.0, 3.5, 9.0])
    evaluated, rates = [], []

    def evaluate(model, *rest):
        evaluated.append({name: weight.clone() for name, weight in model.state_dict().items()})
        return next(scripted)

    train_step = lm.training.loop.Training.train_step

    def watch(training, *rest):
        train_step(training, *rest)
        rates.append({group["lr"] for group in training.precision.param_groups})

    monkeypatch.setattr(lm.training.loop, "evaluate", evaluate)
    monkeypatch.setattr(lm.training.loop.Training, "train_step", watch)
    run = programs.train(script, *flags, "--epochs", "6", "--lr", "16", "--log-interval", "18")

    expected = [16.0, 16.0, 16.0, 4.0, 1.0, 1.0]
    assert [row["lr"] for row in run.epochs] == expected
    assert [row["lr"] for row in run.steps] == [lr for lr in expected for _ in range(BATCHES)]
    assert rates == [{lr} for lr in expected for _ in range(BATCHES)]
    assert re.findall(r"\| lr (\S+) \|", run.out) == [f"{lr:.2f}" for lr in expected]
    assert (run.result["test_loss"], run.result["test_ppl"]) == (9.0, math.exp(9.0))

    saved = saved_weights(programs.folder / "model.safetensors")
    best, last, tested = evaluated[4], evaluated[5], evaluated[6]
    assert any(not torch.equal(best[name], last[name]) for name in best)
    for name in best:
        assert torch.equal(tested[name], best[name])
        assert torch.equal(saved[name], best[name])


def test_a_small_rate_is_not_shown_as_zero(programs):
    run = programs.train("main", "--lr", "0.0012", "--epochs", "1", "--log-interval", "6")
    assert set(re.findall(r"\| lr (\S+) \|", run.out)) == {"0.0012"}


@every_half
def test_a_run_learns(programs, script, flags):
    """Guessing among 18 words is a perplexity of 18; the three sentences can be known by heart."""
    run = programs.train(
        script, *flags, "--epochs", "12", "--dropout", "0", "--nlayers", "1", "--nhid", "16", "--lr", "5"
    )
    assert run.result["test_ppl"] < 6
    assert run.result["test_ppl"] < 0.5 * run.epochs[0]["valid_ppl"]


@every_half
def test_a_seed_makes_a_run(programs, script, flags):
    def rows(seed, name):
        done = programs.run(
            script, *TINY, *flags, "--max-steps", "12", "--seed", seed, "--run-dir", name, "--save", name + ".pt"
        )
        assert done.code == 0
        return (programs.folder / name / "steps.jsonl").read_bytes(), load_model(programs.folder / f"{name}.pt")[0]

    first, model = rows("7", "a")
    again, same = rows("7", "b")
    other, _ = rows("8", "c")
    assert first == again
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), same.parameters(), strict=True))
    assert other != first


@every_script
def test_save_into_the_run_directory(programs, script):
    programs.train(script, "--dry-run", "--save", "run/model.safetensors")
    assert len(load_model(programs.folder / "run" / "model.safetensors")[1]) == 18
