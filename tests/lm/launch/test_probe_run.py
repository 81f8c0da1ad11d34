"""probe.py from its command line to its files."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from jobs import mostly_slow
from lm.data.corpus import Corpus
from lm.model.language_model import RNNModel
from lm.model.model_file import load_model, save_model
from lm.options.modes import PROBED
from programs import PROBE, SMALL, Programs
from roundoff.gradients.result import read_probe

FILES = {"probe.html", "probe.json", "probe.png"}
TIMES = ("seconds", "peak_memory_bytes")
FP32 = ("--modes", "fp32")


def probe(programs: Programs, *flags: str, trainer: Sequence[str] = SMALL) -> dict[str, Any]:
    done = programs.run("probe", *PROBE, *flags, *(("--", *trainer) if trainer else ()))
    assert (done.code, done.err) == (0, ""), done
    assert {path.name for path in (programs.folder / "probe").iterdir()} == FILES
    result = read_probe(programs.folder / "probe" / "probe.json")
    assert done.out.splitlines()[1] == result["about"]  # after what to take
    return result


def test_all_of_it_and_the_same_again(programs) -> None:
    result = probe(programs)
    (programs.folder / "probe").rename(programs.folder / "before")
    again = probe(programs)
    assert [name for name in result if result[name] != again[name] and name not in TIMES] == []
    assert list(result["modes"]) == list(PROBED)
    assert result["about"] == (
        "LSTM of 2 layers with 8 units and 24 words, fresh weights of seed 1111; 4 batches of 4 x 5 words of corpus."
    )
    job = result["job"]
    assert job["weights"] == {"kind": "fresh", "path": None, "epoch": None, "steps": None}
    assert (job["data"], job["corpus"]["name"], job["batch_size"], job["bptt"]) == ("corpus", "corpus", 4, 5)
    assert job["model"]["nhid"] == 8
    assert (result["batches"], result["seed"], result["lr"], result["clip"]) == (4, 1111, 20.0, 0.25)
    keys = ("description", "loss_scale", "computes", "weights", "dtype")
    assert {name: tuple(mode[key] for key in keys) for name, mode in result["modes"].items()} == {
        "fp32": ("main.py", 1, "float32", "float32", "float32"),
        "manual": ("main.py", 128, "float16", "float16", "float16"),
        "fp16-optimizer-dynamic": ("main_fp16_optimizer.py", 65536, "float16", "float16", "float16"),
        "amp-fp16": ("main_amp.py", 65536, "float16", "float32", "float32"),
        "amp-bf16": ("main_amp.py", 1, "bfloat16", "float32", "float32"),
    }
    assert [(one["mode"], one["k"]) for one in result["scales"]["measured"]] == [
        ("manual", 0), ("manual", 7), ("fp16-optimizer-dynamic", 16),
    ]  # fmt: skip
    assert result["seconds"] > 0
    assert result["peak_memory_bytes"] > 1e7


def test_a_run_that_was_started_with_use_optimizer(programs) -> None:
    programs.train("main", "--use-optimizer")
    result = probe(programs, *FP32, "--run", "run", trainer=())
    assert result["lr"] == 0.001
    assert result["modes"]["fp32"]["total"]["stagnated"] is None  # AdamW's update is no multiple of the gradient


@pytest.mark.parametrize("script", mostly_slow(["main", "main_fp16_optimizer", "main_amp"], "main_fp16_optimizer"))
def test_a_run_gives_its_fp32_weights_and_options(programs, script) -> None:
    half = [] if script == "main_amp" else ["--fp16"]
    programs.train(script, *half, "--lr", "3", "--seed", "7", "--static-loss-scale", "2")
    before = programs.files()
    result = probe(programs, "--run", "run", trainer=())
    job = result["job"]
    assert job["weights"] == {"kind": "run", "path": "run", "epoch": 3, "steps": 36}
    assert "weights of run after 36 steps; 4 batches of 4 x 5 words" in result["about"]
    assert (result["seed"], job["batch_size"], job["bptt"], job["model"]["emsize"]) == (7, 4, 5, 8)
    assert result["lr"] in (3.0, 0.75)
    assert result["modes"]["manual"]["loss_scale"] == 2
    assert {name: content for name, content in programs.files().items() if not name.startswith("probe")} == before
    assert load_model(programs.folder / "model.safetensors")[0].options == job["model"]


@pytest.mark.parametrize(("kind", "lr"), [("LSTM", 20.0), ("Transformer", 5.0)])
def test_a_model_file(saved, kind, lr) -> None:
    text = Corpus("corpus")
    model = RNNModel(kind, text.vocab_size, 8, 8, 2, 0.2).half()
    save_model(saved.folder / "model.safetensors", model, text.dictionary.idx2word)
    result = probe(saved, *FP32, "--checkpoint", "model.safetensors", trainer=("--bptt", "6", "--batch_size", "3"))
    job = result["job"]
    assert (job["weights"]["kind"], job["weights"]["path"]) == ("checkpoint", "model.safetensors")
    assert (job["bptt"], job["batch_size"], job["model"]["nhid"]) == (6, 3, 8)
    assert (job["model"]["kind"], result["lr"]) == (kind, lr)
    assert "weights of model.safetensors; 4 batches of 3 x 6 words" in result["about"]


def test_the_best_model_of_a_run_directory(programs) -> None:
    """On the run's own corpus, where --data names no other."""
    programs.train("main", "--dry-run")
    options = ("--batches", "4", "--modes", "fp32", "--out", "probe")
    assert programs.run("probe", *options, "--checkpoint", "run", "--", "--bptt", "5", "--batch_size", "4").code == 0
    job = json.loads((programs.folder / "probe" / "probe.json").read_text())["job"]
    assert (job["weights"]["kind"], job["weights"]["path"], job["data"]) == ("checkpoint", "run", "corpus")
    assert job["model"]["emsize"] == 8
