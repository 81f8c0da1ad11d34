"""The text that comes with Python, as a corpus."""

import hashlib
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from lm.data import corpora


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
    program = "from lm import corpora; print(corpora.read('python-docs').sha256)"
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", program],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(Path(corpora.__file__).parents[2])},
            capture_output=True,
            text=True,
            check=True,
        )
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
