"""A user's mistake is one clear line and exit code 2, and leaves nothing behind."""

import os

import pytest
import torch

from lm.model.recurrent import LSTM
from programs import SCRIPTS, TINY, Programs, read_run, start
from roundoff.program import exit_code
from runs import RUN_FILES

every_script = pytest.mark.parametrize("script", SCRIPTS)


def refuse(programs: Programs, script: str, *flags: str) -> str:
    return programs.refuse(script, *TINY, *flags)


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@every_script
def test_missing_corpus_file(programs, script, split):
    (programs.folder / "corpus" / f"{split}.txt").unlink()
    assert f"{split}.txt" in refuse(programs, script)


@pytest.mark.parametrize("content", ["", " \n\n \n"], ids=["no byte", "blank"])
@pytest.mark.parametrize("split", ["train", "valid", "test"])
def test_empty_corpus_file(programs, split, content):
    (programs.folder / "corpus" / f"{split}.txt").write_text(content)
    error = refuse(programs, "main")
    assert f"{split}.txt" in error
    assert "empty" in error


def test_no_such_folder_and_a_file_for_a_folder(programs):
    assert "nowhere" in refuse(programs, "main", "--data", "nowhere")
    assert "train.txt" in refuse(programs, "main", "--data", "corpus/train.txt")


@every_script
def test_text_that_is_not_utf8(programs, script):
    path = programs.folder / "corpus" / "valid.txt"
    path.write_bytes("ein schöner Tag\n".encode("latin-1") * 50)
    error = refuse(programs, script)
    assert "valid.txt" in error
    assert "UTF-8" in error


@pytest.mark.parametrize("split", ["train", "valid", "test"])
@every_script
def test_a_corpus_too_short_for_the_batch(programs, script, split):
    """The line names the part that is too short: a smaller --batch_size helps for the training text alone."""
    (programs.folder / "corpus" / f"{split}.txt").write_text("only five words and eos\n")
    error = refuse(programs, script)
    assert "6 tokens" in error
    assert split in error
    if split != "train":
        assert "smaller batch size" not in error


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--nlayers 0", "--nlayers '0' 1"),
        ("--nlayers -1", "--nlayers '-1' 1"),
        ("--nlayers 1.5", "--nlayers '1.5' whole"),
        ("--dropout 1.5", "--dropout '1.5' 0 1"),
        ("--dropout 1", "--dropout '1' below"),
        ("--dropout -0.1", "--dropout '-0.1' 0"),
        ("--dropout nan", "--dropout 'nan'"),
        ("--clip -1", "--clip '-1' 0"),
        ("--clip 0", "--clip '0' above"),
        ("--clip nan", "--clip 'nan'"),
        ("--lr 0", "--lr '0' above"),
        ("--lr -20", "--lr '-20'"),
        ("--lr inf", "--lr 'inf'"),
        ("--emsize 0", "--emsize '0'"),
        ("--nhid 0", "--nhid '0'"),
        ("--epochs 0", "--epochs '0'"),
        ("--batch_size 0", "--batch_size '0'"),
        ("--batch-size 0", "--batch-size '0'"),
        ("--bptt 0", "--bptt '0'"),
        ("--seed -1", "--seed '-1' 0"),
        ("--seed one", "--seed 'one'"),
        ("--log-interval 0", "--log-interval '0'"),
        ("--max-steps 0", "--max-steps '0'"),
        ("--max-skipped 0", "--max-skipped '0'"),
        ("--scale-window 0", "--scale-window '0'"),
        ("--static-loss-scale 0", "--static-loss-scale '0'"),
        ("--static-loss-scale -128", "--static-loss-scale '-128'"),
        ("--static-loss-scale nan", "--static-loss-scale 'nan'"),
        ("--static-loss-scale inf", "--static-loss-scale 'inf'"),
        ("--static-loss-scale 1e39", "--static-loss-scale '1e39'"),
        ("--static-loss-scale 1e-46", "--static-loss-scale '1e-46'"),  # 0 in fp32, and 1/1e-40 is inf there
        ("--static-loss-scale 1e-40", "--static-loss-scale '1e-40'"),
        ("--static-loss-scale high", "--static-loss-scale 'high'"),
        ("--init-scale 0", "--init-scale '0'"),
        ("--init-scale nan", "--init-scale 'nan'"),
        ("--init-scale text", "--init-scale 'text'"),
        ("--model TRANSFORMER", "--model 'TRANSFORMER' RNN_TANH RNN_RELU LSTM GRU"),
        ("--tied --emsize 8 --nhid 16", "--tied --emsize 8 --nhid 16 equal"),
        ("--device gpu", "--device gpu cpu cuda"),
        ("--device meta", "--device meta cpu cuda"),
        ("--device cpu:1", "--device cpu:1"),
        ("--cuda --device cpu", "--cuda --device cpu contradict"),
        ("--tf32", "--tf32 cpu"),
        ("--nlayer 2", "--nlayer --help"),
        ("--epochs", "--epochs --help"),
        ("surplus", "surplus --help"),
    ],
)
@every_script
def test_impossible_values(programs, script, flags, said):
    """The line says what was given and what is allowed."""
    error = refuse(programs, script, *flags.split())
    for part in said.split():
        assert part in error


def test_dtypes_that_amp_has_not(programs):
    error = refuse(programs, "main_amp", "--dtype", "float64")
    assert all(part in error for part in ("--dtype", "'float64'", "float16", "bfloat16", "float32"))


def test_flags_of_another_trainer(programs):
    assert "--dtype" in refuse(programs, "main", "--dtype", "float16")
    assert "--dynamic-loss-scale" in refuse(programs, "main", "--fp16", "--dynamic-loss-scale")
    assert "--fp16-utils" in refuse(programs, "main_fp16_optimizer", "--fp16-utils", "other")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU, so --cuda is no mistake")
@pytest.mark.parametrize("flags", [["--cuda"], ["--device", "cuda"], ["--device", "cuda:1"]])
@every_script
def test_cuda_without_cuda(programs, script, flags):
    error = refuse(programs, script, *flags)
    assert flags[0] in error
    assert "CPU" in error


def test_fp16_utils_of_an_apex_that_is_not_there(programs, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "apex", None)
    monkeypatch.setitem(__import__("sys").modules, "apex.fp16_utils", None)
    error = refuse(programs, "main_fp16_optimizer", "--fp16", "--fp16-utils", "apex")
    assert "--fp16-utils apex" in error
    assert "install" in error


@pytest.mark.parametrize(
    ("script", "flags", "remedy"),
    [
        ("main", ["--fp16"], "bfloat16"),
        ("main_fp16_optimizer", ["--fp16", "--dynamic-loss-scale"], "bfloat16"),
        ("main_amp", [], "bfloat16"),
        ("main_amp", ["--dtype", "bfloat16"], "float16"),
    ],
)
@pytest.mark.parametrize("when", ["training", "evaluation", "backward"])
def test_a_half_dtype_that_this_cpu_cannot_run(programs, monkeypatch, script, flags, remedy, when):
    message = (
        "could not create a primitive descriptor for the LSTM forward propagation primitive. Run workload with "
        "environment variable ONEDNN_VERBOSE=all to get additional diagnostic information."
    )
    forward = LSTM.forward

    def fail(*_):
        raise RuntimeError(message)

    def forward_on_another_cpu(self, input, hx=None):
        output, hidden = forward(self, input, hx)
        if when != "backward" and self.training == (when == "training"):
            fail()
        if when == "backward" and output.requires_grad:
            output.register_hook(fail)
        return output, hidden

    monkeypatch.setattr(LSTM, "forward", forward_on_another_cpu)
    error = refuse(programs, script, *flags)
    dtype = "bfloat16" if "bfloat16" in flags else "float16"
    assert f"LSTM in {dtype}" in error
    assert "could not create a primitive descriptor" in error
    assert f"--dtype {remedy}" in error
    assert "fp32" in error


@pytest.mark.parametrize("place", ["corpus", "nowhere/model.pt", "corpus/train.txt/model.pt", "pipe"])
@every_script
def test_unwritable_save(programs, script, place):
    """A directory; no such parent; a parent that is a file; a device or pipe, which a rename would destroy."""
    os.mkfifo(programs.folder / "pipe")
    error = refuse(programs, script, "--save", place)
    assert f"--save {place}" in error
    assert (programs.folder / "pipe").is_fifo()


@pytest.mark.parametrize("run_dir", ["run", "deep/run"])
@pytest.mark.parametrize("name", ["", "..", *RUN_FILES, "checkpoint.previous.pt", "checkpoint.damaged.pt"])
@pytest.mark.parametrize("flag", ["--save", "--onnx-export"])
def test_save_may_not_be_the_runs_own(programs, flag, name, run_dir):
    """Else the model took the checkpoint's place, or the run its directory's."""
    (programs.folder / "link").symlink_to(".")
    place = f"link/{run_dir}/{name}"
    assert f"{flag} {place.removesuffix('/')} is the run's own" in refuse(
        programs, "main", flag, place, "--run-dir", run_dir
    )


def test_save_may_not_be_the_runs_own_when_it_goes_on(programs):
    programs.train("main")
    assert "--save run/checkpoint.pt is" in programs.refuse("main", "--resume", "run", "--save", "run/checkpoint.pt")
    assert "--save runs is" in programs.refuse("main", *TINY[:-2], "--save", "runs")
    (programs.folder / "elsewhere.pt").symlink_to("run/checkpoint.pt")
    (programs.folder / "run" / "checkpoint.pt").rename(programs.folder / "far.pt")
    (programs.folder / "run" / "checkpoint.pt").symlink_to("../far.pt")
    for place in ("elsewhere.pt", "far.pt", "run/checkpoint.pt"):
        assert f"--save {place} is" in programs.refuse("main", "--resume", "run", "--save", place)


def test_a_link_to_itself_is_a_place_as_any_other(programs):
    (programs.folder / "loop").symlink_to("loop")
    assert "--run-dir loop: cannot write there" in refuse(programs, "main", "--run-dir", "loop")
    assert "loop" in programs.refuse("generate", "--checkpoint", "loop")


@pytest.mark.parametrize("run_dir", ["corpus/train.txt/{seed}", "corpus/train.txt/{}"])
def test_braces_in_a_path(programs, run_dir):
    assert f"--run-dir {run_dir}: cannot write there (Not a directory)" in refuse(
        programs, "main", "--run-dir", run_dir
    )


@pytest.mark.parametrize("flag", ["--data", "--save", "--run-dir"])
def test_a_path_that_is_not_utf8(programs, flag):
    (programs.folder / "corpus").rename(programs.folder / "caf\udce9")
    assert "caf\\udce9 is not UTF-8" in refuse(programs, "main", flag, "caf\udce9")


@pytest.mark.parametrize("place", ["corpus/train.txt", "corpus/train.txt/run"])
@every_script
def test_unwritable_run_dir(programs, script, place):
    assert f"--run-dir {place}" in refuse(programs, script, "--run-dir", place)


@every_script
def test_a_run_dir_that_holds_a_run(programs, script):
    programs.train(script, "--dry-run")
    assert "--run-dir run" in refuse(programs, script, "--dry-run")


def test_default_run_dir_where_runs_is_a_file(programs):
    (programs.folder / "runs").write_text("")
    before = programs.files()
    done = programs.run("main", *TINY[:-2], "--dry-run")
    assert (done.code, done.err.count("\n")) == (2, 1)
    assert programs.files() == before
    assert "runs" in done.err
    assert "--run-dir main-fp32" not in done.err, "nobody gave that flag"


def test_a_new_run_dir_of_several_levels_is_made(programs):
    assert programs.run("main", *TINY, "--dry-run", "--run-dir", "new/deep/run").code == 0
    assert read_run(programs.folder / "new" / "deep" / "run").result["status"] == "finished"


@pytest.mark.slow
def test_the_process_itself_shows_no_traceback(programs):
    """What the other tests see in their own process, once as a user does."""
    before = programs.files()
    process = start(programs.folder, "main_amp", *TINY, "--save", "nowhere/model.pt", stdout=-1, stderr=-1)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err.count(b"\n")) == (2, b"", 1)
    assert err.startswith(b"error: ")
    assert programs.files() == before


def test_ctrl_c_before_training(programs):
    def interrupted() -> int:
        raise KeyboardInterrupt

    assert exit_code(interrupted) == 130
