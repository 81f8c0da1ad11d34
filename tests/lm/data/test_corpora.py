"""Corpora as text: folders of files, the WikiText-2 of this repository, and the text that comes with Python."""

import hashlib
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from lm.data import corpora
from programs import ROOT
from roundoff.errors import UsageError

FILES = {
    "train.txt": b" = Robot = \n \n a robot <unk> is a robot \n" * 3,
    "valid.txt": b" = Valid = \n some more text \n",
    "test.txt": " = Test = \n caf\u00e9 \n".encode(),
}


def write(folder: Path, files: dict[str, bytes] | None = None) -> Path:
    """Write a corpus with `files` in place of some of FILES."""
    folder.mkdir(parents=True)
    for name, content in (FILES | (files or {})).items():
        (folder / name).write_bytes(content)
    return folder


# Folders


def test_a_folder_gives_its_texts_and_digests(tmp_path: Path) -> None:
    texts = corpora.read(write(tmp_path / "mine"))
    assert texts.name == "mine"
    assert [texts.train, texts.valid, texts.test] == [content.decode() for content in FILES.values()]
    assert texts.sha256 == {
        name.removesuffix(".txt"): hashlib.sha256(content).hexdigest() for name, content in FILES.items()
    }


def test_line_ends_of_other_systems_become_newlines_and_digests_are_of_the_bytes(tmp_path: Path) -> None:
    raw = b"a b\r\nc\rd\n\r\n"
    texts = corpora.read(write(tmp_path / "mine", {"train.txt": raw}))
    assert texts.train == "a b\nc\nd\n\n"
    assert texts.sha256["train"] == hashlib.sha256(raw).hexdigest()


WANTED = "; give a folder with train.txt, valid.txt and test.txt, or --data python-docs for the built-in text"

MISTAKES: dict[str, tuple[Callable[[Path], object], str]] = {
    "no folder": (lambda at: None, "--data AT: there is no such folder" + WANTED),
    "a file": (lambda at: at.write_text("a b\n"), "--data AT: this is a file" + WANTED),
    "a circle of links": (lambda at: at.symlink_to(at.name), "--data AT: there is no such folder" + WANTED),
    "files missing": (
        lambda at: [(write(at) / "train.txt").unlink(), (at / "test.txt").unlink()],
        "--data AT: the folder has no train.txt and no test.txt" + WANTED,
    ),
    "a folder for a file": (
        lambda at: [(write(at) / "train.txt").unlink(), (at / "train.txt").mkdir()],
        "--data AT: cannot read AT/train.txt: Is a directory",
    ),
    "no UTF-8": (
        lambda at: write(at, {"test.txt": b"caf\xc3\xa9 caf\xe9 \n"}),
        "AT/test.txt: the file is not UTF-8 (byte 0xe9 at offset 9); convert it to UTF-8",
    ),
} | {
    f"no word in {content!r}": (
        lambda at, content=content: write(at, {"valid.txt": content}),
        "AT/valid.txt: the file is empty; it must have at least one word",
    )
    for content in (b"", b" \n\t\r\n", "\u2028".encode())
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_line_that_says_what_to_do(tmp_path: Path, mistake: str) -> None:
    folder = tmp_path / "mine"
    spoil, said = MISTAKES[mistake]
    spoil(folder)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError) as caught:
        corpora.read(folder)
    assert str(caught.value) == said.replace("AT", str(folder))
    assert sorted(tmp_path.rglob("*")) == before


def test_a_name_that_no_system_takes_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=re.compile(r"^--data [^\n]*x: cannot read [^\n]+$")):
        corpora.read(tmp_path / ("x" * 300))


def test_where_wikitext2_is_not_the_default_says_what_to_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="^--data data/wikitext-2: there is no such folder" + re.escape(WANTED)):
        corpora.read(corpora.DEFAULT)
    assert not any(tmp_path.iterdir())


def test_a_folder_of_corpora_stands_for_the_corpus_in_it(tmp_path: Path) -> None:
    assert corpora.find(corpora.BUILT_IN) == corpora.BUILT_IN
    assert corpora.find("nowhere") == "nowhere"
    shelf = tmp_path / "shelf"
    one = write(shelf / "one")
    assert corpora.find(str(one)) == str(one)
    assert corpora.find(str(shelf)) == str(one)
    write(shelf / "two")
    with pytest.raises(UsageError, match="holds the corpora one, two; give one of them"):
        corpora.find(str(shelf))
    write(shelf / "wikitext-2")
    assert corpora.find(str(shelf)) == str(shelf / "wikitext-2")


# WikiText-2

WIKITEXT2 = ROOT / corpora.DEFAULT
SHA256 = {
    "train": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
"""The digests of the published files, those of the PyTorch example."""


def test_wikitext2_is_here_in_the_published_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert corpora.find("./data") == "data/wikitext-2"
    texts = corpora.read(corpora.DEFAULT)
    assert (texts.name, texts.sha256) == ("wikitext-2", SHA256)


# The text that comes with Python


@pytest.fixture(scope="module")
def docs() -> corpora.Texts:
    return corpora.read("python-docs")


def test_python_docs_has_the_size_and_shares_it_promises(docs: corpora.Texts) -> None:
    words = {split: len(getattr(docs, split).split()) for split in corpora.SPLITS}
    total = sum(words.values())
    assert 90_000 < total < 200_000
    for split, share in corpora.SHARES.items():
        assert words[split] / total == pytest.approx(share, abs=0.01)
        assert docs.sha256[split] == hashlib.sha256(getattr(docs, split).encode()).hexdigest()


def test_python_docs_has_no_blank_lines_and_no_rare_words(docs: corpora.Texts) -> None:
    everything = docs.train + docs.valid + docs.test
    assert everything.endswith("\n")
    assert all(line == " ".join(line.split()) != "" for line in everything.removesuffix("\n").split("\n"))
    counts = Counter(everything.split())
    assert min(counts.values()) >= corpora.MIN_COUNT
    assert counts["<unk>"] > 1000


def test_little_of_python_docs_valid_and_test_stands_in_train(docs: corpora.Texts) -> None:
    train = set(docs.train.split("\n"))
    for text in (docs.valid, docs.test):
        lines = [line for line in text.split("\n") if len(line) > 40]
        assert sum(line in train for line in lines) < 0.05 * len(lines)


@pytest.mark.slow
def test_python_docs_is_the_same_in_every_process(docs: corpora.Texts) -> None:
    program = "from lm.data import corpora; print(corpora.read('python-docs').sha256)"
    for seed in ("1", "2"):
        environment = os.environ | {"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"{docs.sha256}\n"


def test_splits_keep_parts_and_wholes_together() -> None:
    def text(name: str, words: int) -> list[str]:
        return [f"{name} {i}" for i in range(words // 2)]

    topics = {name: text(name, 200) for name in "abcdefghij"}
    topics["part"] = text("c", 150)
    split_of = corpora._split_by_topic(topics)
    assert split_of["part"] == split_of["c"] == "train"
    assert set(split_of) == set(topics)
    assert set(split_of.values()) == {"train", "valid", "test"}
