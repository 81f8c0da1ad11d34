"""What people expect of any command line: versions, groups in the help, completion, and the list of corpora."""

import hashlib
import os
import subprocess
import sys

import pytest
import torch

import roundoff
from lm.data import corpora
from programs import ROOT, SCRIPTS, write_corpus
from roundoff.program import exit_code


@pytest.mark.parametrize("script", [*SCRIPTS, "generate", "compare", "probe"])
def test_version(programs, script):
    done = programs.run(script, "--version")
    assert (done.code, done.err) == (0, "")
    assert done.out == f"{script}.py {roundoff.__version__} (torch {torch.__version__})\n"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_is_in_groups(programs, script):
    out = programs.run(script, "--help").out
    groups = [line[:-1] for line in out.splitlines() if line.endswith(":") and not line.startswith(" ")]
    assert groups == ["options", "data", "model", "training", "precision", "records"]
    assert f"With Sacred: {script}.py [COMMAND]" in out


@pytest.mark.slow
def test_the_shell_completes_flags_and_choices(tmp_path):
    """As the shell asks: the line so far in the environment, the answer in a file."""
    answer = tmp_path / "answer"
    line = "main.py --model "
    asks = {
        "_ARGCOMPLETE": "1",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_STDOUT_FILENAME": answer,
    }
    environment = os.environ | {name: str(value) for name, value in asks.items()}
    subprocess.run([sys.executable, ROOT / "main.py"], env=environment, cwd=tmp_path, timeout=120, check=False)
    assert answer.read_text().replace("\x0b", " ").replace("\x0d", " ").split() == [
        "RNN_TANH",
        "RNN_RELU",
        "LSTM",
        "GRU",
        "Transformer",
    ]


@pytest.mark.parametrize("script", [*SCRIPTS, "generate", "compare", "probe"])
def test_argcomplete_finds_its_mark(script):
    assert b"PYTHON_ARGCOMPLETE_OK" in (ROOT / f"{script}.py").read_bytes()[:1024]


@pytest.fixture
def list_corpora(tmp_path, monkeypatch, capsys):
    """`python -m lm.data.corpora words`, in an empty folder: exit code, stdout, stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str):
        monkeypatch.setattr(sys, "argv", ["corpora.py", *words])
        return exit_code(corpora.main), *capsys.readouterr()

    return run


def test_corpora_are_listed_with_their_places(tmp_path, list_corpora, monkeypatch):
    code, out, err = list_corpora()
    first, last = out.splitlines()
    assert (code, err) == (0, "")
    assert first.startswith("wikitext-2    not here; python -m lm.data.corpora wikitext-2 fetches it into ")
    assert last.startswith("python-docs   built in; ")
    assert not any(tmp_path.iterdir())

    (tmp_path / "data").mkdir()
    folder = write_corpus(tmp_path / "data" / "wikitext-2")
    write_corpus(tmp_path / "data" / "mine")
    lines = list_corpora()[1].splitlines()
    assert lines[0] == f"wikitext-2    {folder} (not the published text)"
    assert lines[1] == f"mine          {tmp_path / 'data' / 'mine'}"
    pinned = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    monkeypatch.setattr(corpora, "WIKITEXT2_SHA256", pinned)
    assert list_corpora()[1].splitlines()[0] == f"wikitext-2    {folder}"
    (folder / "test.txt").unlink()
    assert "no test.txt" in list_corpora()[1].splitlines()[0]


def test_a_corpus_is_fetched_by_name_once(tmp_path, list_corpora, monkeypatch):
    fetched = []

    def fetch(folder):
        fetched.append(folder)
        (tmp_path / "data").mkdir()
        write_corpus(tmp_path / "data" / "wikitext-2")

    monkeypatch.setattr(corpora, "fetch_wikitext2", fetch)
    for _ in range(2):
        code, out, _ = list_corpora("wikitext-2")
        assert (code, len(out.splitlines())) == (0, 1)
        assert str(tmp_path / "data" / "wikitext-2") in out
    assert fetched == [corpora.DEFAULT]
    assert list_corpora("python-docs")[0] == 0
    code, out, err = list_corpora("wikitext-3")
    assert (code, out) == (2, "")
    assert err == "error: 'wikitext-3' is no known corpus; there are wikitext-2, python-docs\n"


def test_a_folder_of_corpora_stands_for_the_corpus_in_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert corpora.find("./data") == "data/wikitext-2"  # where it would be fetched to
    assert corpora.find(corpora.BUILT_IN) == corpora.BUILT_IN
    assert corpora.find("nowhere") == "nowhere"
    shelf = tmp_path / "shelf"
    shelf.mkdir()
    one = write_corpus(shelf / "one")
    assert corpora.find(str(one)) == str(one)
    assert corpora.find(str(shelf)) == str(one)
    write_corpus(shelf / "two")
    with pytest.raises(corpora.UsageError, match="holds the corpora one, two; give one of them"):
        corpora.find(str(shelf))
    write_corpus(shelf / "wikitext-2")
    assert corpora.find(str(shelf)) == str(shelf / "wikitext-2")
