"""generate.py: text from any trainer's model."""

import io
import os

import pytest
import torch

import generate
from lm.model.language_model import KINDS
from lm.model.model_file import load_model, save_model
from lm.training.checkpoint import FILE, FORMAT
from programs import HALF, MODEL, SCRIPTS, WORDS, Programs, make_model
from roundoff.runs.tensor_file import load_tensors, save_tensors


def text(programs: Programs, *flags: str) -> str:
    done = programs.run("generate", *flags)
    assert (done.code, done.err) == (0, "")
    return (programs.folder / "generated.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(("script", "flags"), [("main", []), *((s, HALF[s]) for s in SCRIPTS)])
def test_every_trainers_model_serves(programs, script, flags):
    """Without the corpus, and in another folder."""
    programs.train(script, "--dry-run", *flags)
    for path in (programs.folder / "corpus").iterdir():
        path.unlink()
    words = text(programs, "--words", "250").split()
    vocabulary = set("the cat sat on mat . <eos> a dog ran after bird sang all day long in tree".split())  # noqa: SIM905
    assert len(words) == 250
    assert set(words) <= vocabulary
    assert len(set(words)) > 10


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_layer_serves(programs, kind, tied):
    save_model(programs.folder / "model.safetensors", make_model(kind, tied).half(), WORDS)
    assert len(text(programs, "--words", "30").split()) == 30


@pytest.mark.parametrize("words", [1, 19, 20, 21, 1000])
def test_number_of_words_and_progress_lines(saved, words):
    done = saved.run("generate", "--words", str(words), "--outf", "out.txt", "--log-interval", "7")
    assert (done.code, done.err) == (0, "")
    written = (saved.folder / "out.txt").read_text(encoding="utf-8")
    assert written.endswith("\n")
    assert len(written.split()) == words
    assert done.out == "".join(f"| Generated {i}/{words} words\n" for i in range(7, words + 1, 7)) + (
        f"| {words} words are in out.txt\n"
    )


def test_defaults(saved):
    done = saved.run("generate")
    assert done.out == "".join(f"| Generated {i}/1000 words\n" for i in range(100, 1001, 100)) + (
        "| 1000 words are in generated.txt\n"
    )
    default = (saved.folder / "generated.txt").read_bytes()
    flags = "--outf generated.txt --words 1000 --seed 1111 --temperature 1.0 --log-interval 100"
    assert saved.run("generate", "--checkpoint", "model.safetensors", *flags.split()).out == done.out
    assert (saved.folder / "generated.txt").read_bytes() == default


def test_a_seed_makes_a_text(saved):
    first = text(saved, "--words", "60", "--seed", "7")
    torch.rand(5)  # what was drawn before is nothing to it
    assert text(saved, "--words", "60", "--seed", "7") == first
    assert text(saved, "--words", "60", "--seed", "8") != first
    assert text(saved, "--words", "20", "--seed", "7") == first.splitlines(keepends=True)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_on_a_device(programs, device, kind):
    """The same at each time, and the CPU's: fp32 is not rounded to TF32, and all devices draw the same."""
    save_model(programs.folder / "model.safetensors", make_model(kind), WORDS)
    first = text(programs, "--words", "40", "--device", device)
    assert text(programs, "--words", "40", "--device", device) == first
    assert text(programs, "--words", "40") == first


@pytest.mark.parametrize("words", ["1", "20", "45"])
def test_outf_to_the_terminal(saved, words):
    """The text alone, the same as in a file, and no file."""
    expected = text(saved, "--words", words, "--log-interval", "7")
    (saved.folder / "generated.txt").unlink()
    before = saved.files()
    done = saved.run("generate", "--words", words, "--log-interval", "7", "--outf", "-")
    assert (done.code, done.err, done.out) == (0, "", expected)
    assert saved.files() == before
    assert saved.run("generate", "--words", words, "--outf", "./-").code == 0
    assert (saved.folder / "-").read_text(encoding="utf-8") == expected


def test_words_come_to_the_terminal_one_by_one(saved, monkeypatch):
    """Whoever pulls the plug after the third has read two, and the begun line stays as it is."""
    real, calls = torch.multinomial, []

    def third_fails(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(torch, "multinomial", third_fails)
    done = saved.run("generate", "--outf", "-")
    assert done.code == 130
    assert len(done.out.split()) == 2


def test_a_word_that_would_command_the_terminal(programs):
    save_model(programs.folder / "model.safetensors", make_model(), [f"\x1b[{i}m" for i in range(10)])
    out = programs.run("generate", "--words", "9", "--outf", "-").out
    assert "\x1b" not in out
    assert out.count("\\x1b[") == 9


def test_a_terminal_that_lacks_a_letter(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", out)
    generate.show(["schön", "\n"])
    assert out.buffer.getvalue() == b"sch\\xf6n\n"


def test_temperature(saved):
    """Against plain argmax where it is low, and against even odds where it is high."""
    cold = text(saved, "--words", "40", "--temperature", "0.001").split()
    model = make_model().eval()
    torch.manual_seed(1111)
    token, hidden, expected = torch.randint(len(WORDS), (1, 1)), model.init_hidden(1), []
    with torch.no_grad():
        for _ in range(40):
            scores, hidden = model(token, hidden)
            token = scores[0, :, : len(WORDS)].argmax(1, keepdim=True)
            expected.append(WORDS[int(token)])
    assert cold == expected

    warm = text(saved, "--words", "40").split()
    assert warm[:10] != cold[:10]
    hot = text(saved, "--words", "800", "--temperature", "10000").split()
    for word in WORDS:
        assert abs(hot.count(word) / 800 - 1 / len(WORDS)) < 0.064  # 6 standard deviations


def test_dropout_is_off(programs):
    """At dropout 0.9 almost nothing of a model's state would be left."""
    for name, dropout in {"a": 0.0, "b": 0.9}.items():
        model = make_model()
        model.options["dropout"] = dropout
        save_model(programs.folder / name, model, WORDS)
    assert text(programs, "--words", "50", "--checkpoint", "a") == text(programs, "--words", "50", "--checkpoint", "b")


def test_padding_is_never_written(programs):
    """Even where the model is sure of it."""
    model = make_model()
    with torch.no_grad():
        model.decoder.bias[len(WORDS) :] = 1e4
    save_model(programs.folder / "model.safetensors", model, WORDS)
    words = text(programs, "--words", "500").split()
    assert len(words) == 500
    assert set(words) <= set(WORDS)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--words 0", "--words '0'"),
        ("--words many", "--words 'many'"),
        ("--seed -1", "--seed '-1'"),
        ("--temperature 0", "--temperature '0' 0.001"),
        ("--temperature nan", "--temperature 'nan'"),
        ("--temperature -1", "--temperature '-1'"),
        ("--log-interval 0", "--log-interval '0'"),
        ("--outf nowhere/x.txt --words 5", "--outf nowhere/x.txt"),
        ("--outf corpus --words 5", "--outf corpus"),
        ("--outf model.safetensors/x.txt --words 5", "--outf model.safetensors/x.txt"),
        ("--word 5", "--word --help"),
    ],
)
def test_mistakes(saved, flags, said):
    error = saved.refuse("generate", *flags.split())
    for part in said.split():
        assert part in error


def test_the_text_may_not_take_the_models_place(saved):
    assert "--outf and --checkpoint are both model.safetensors" in saved.refuse(
        "generate", "--outf", "model.safetensors"
    )


def test_an_outf_that_cannot_be_written_is_found_before_the_work(saved):
    """After the thousandth word it would be too late."""
    done = saved.run("generate", "--outf", "nowhere/x.txt", "--log-interval", "1")
    assert (done.code, done.out) == (2, "")


def test_a_temperature_of_infinity_is_even_odds_or_a_mistake(saved):
    done = saved.run("generate", "--temperature", "inf", "--words", "50")
    assert done.code in (0, 2)
    assert done.err.count("\n") == (done.code == 2)


def test_an_outf_that_is_a_pipe_stays_one(saved):
    """Put in place by a rename, text would take the place of /dev/stdout or /dev/null itself."""
    os.mkfifo(saved.folder / "pipe")
    reader = os.open(saved.folder / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    saved.run("generate", "--outf", "pipe", "--words", "5")
    os.close(reader)
    assert (saved.folder / "pipe").is_fifo()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA GPU, so --cuda is no mistake")
def test_cuda_without_cuda(saved):
    error = saved.refuse("generate", "--cuda")
    assert "--cuda" in error
    assert "CPU" in error


def test_a_line_has_20_words():
    assert "".join(generate.as_text(str(i) for i in range(41))).split("\n") == [
        " ".join(map(str, range(20))),
        " ".join(map(str, range(20, 40))),
        "40",
        "",
    ]


def test_old_files_stay_until_the_text_is_whole(saved, monkeypatch):
    (saved.folder / "generated.txt").write_text("old")
    monkeypatch.setattr("lm.model.generation.generate", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    assert saved.run("generate").code == 130
    assert (saved.folder / "generated.txt").read_text() == "old"


def test_the_model_read_is_the_model_saved(saved):
    model, vocabulary = load_model(saved.folder / "model.safetensors")
    assert vocabulary == WORDS
    for (name, weight), (_, original) in zip(
        model.state_dict().items(), make_model().state_dict().items(), strict=True
    ):
        assert torch.equal(weight, original), name


@pytest.mark.parametrize(("script", "flags"), [("main", ["--tied"]), *((s, HALF[s]) for s in SCRIPTS)])
def test_a_run_directory_stands_for_its_best_model(programs, script, flags):
    """Also once another run has overwritten the file, or where the directory has moved with the file in it."""
    programs.train(script, *flags)
    best = text(programs, "--words", "40")
    assert text(programs, "--words", "40", "--checkpoint", "run") == best
    (programs.folder / MODEL).rename(programs.folder / "run" / MODEL)
    (programs.folder / "run").rename(programs.folder / "moved")
    (programs.folder / "corpus").rename(programs.folder / "away")
    assert text(programs, "--words", "40", "--checkpoint", "moved") == best
    (programs.folder / "away").rename(programs.folder / "corpus")
    save_model(programs.folder / "moved" / MODEL, make_model(), WORDS)
    assert text(programs, "--words", "40", "--checkpoint", "moved") == best
    (programs.folder / "corpus" / "train.txt").write_text("another corpus\n")
    assert "its words are only in its corpus (--data corpus is another" in programs.refuse(
        "generate", "--checkpoint", "moved"
    )


def test_a_run_that_was_stopped_before_its_first_validation(programs):
    """It has saved the model as it was then."""
    programs.train("main", "--dry-run")
    content = load_tensors(programs.folder / "run" / FILE, FORMAT)
    expected = text(programs, "--words", "40")
    (programs.folder / MODEL).unlink()
    save_tensors(programs.folder / "run" / FILE, content | {"best_weights": None}, FORMAT)
    assert text(programs, "--words", "40", "--checkpoint", "run") == expected


@pytest.mark.parametrize("weights", [7, {"a": 1}, torch.zeros(3), {"decoder.bias": torch.zeros(3)}])
def test_a_run_directory_made_to_do_harm(programs, weights):
    programs.train("main", "--dry-run")
    content = load_tensors(programs.folder / "run" / FILE, FORMAT)
    save_tensors(programs.folder / "run" / FILE, content | {"best_weights": weights}, FORMAT)
    assert "--checkpoint run: checkpoint.safetensors contradicts itself" in programs.refuse(
        "generate", "--checkpoint", "run"
    )
