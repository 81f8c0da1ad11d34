"""Corpora as token ids, and the batches made of them."""

from pathlib import Path

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fuzzing import fuzz
from lm.data import corpora
from lm.data import corpus as lm_data
from lm.data.corpus import Corpus, Dictionary, batchify, get_batch
from programs import ROOT
from roundoff.errors import UsageError


def numbered_line_by_line(folder: Path) -> tuple[list[str], dict[str, list[int]]]:
    """The words and the ids of a corpus as the PyTorch tutorial defines them: the oracle."""
    words: list[str] = []
    number: dict[str, int] = {}
    ids: dict[str, list[int]] = {}
    for split in ("train", "valid", "test"):
        ids[split] = []
        with (folder / f"{split}.txt").open(encoding="utf8") as lines:
            for line in lines:
                for word in [*line.split(), "<eos>"]:
                    if word not in number:
                        number[word] = len(words)
                        words.append(word)
                    ids[split].append(number[word])
    return words, ids


SPACES = " \t\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2003\u2028\u2029\u3000"
PIECES = st.one_of(
    st.sampled_from([*SPACES, "\n", "\n", "\n\n", "\r\n", "\r", "\n\r"]),
    st.sampled_from(["a", "b", "the", "<unk>", "<eos>", "\ufeff", "\u200b", "\U0001d11e"]),
    st.text(max_size=5),
)
# Something that is no space, anywhere in anything.
TEXTS = st.tuples(st.lists(PIECES), st.sampled_from(["a", "<eos>"]), st.lists(PIECES)).map(
    lambda parts: "".join([*parts[0], parts[1], *parts[2]])
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("corpus")


@pytest.mark.slow
@fuzz(300)
@given(train=TEXTS, valid=TEXTS, test=TEXTS, piece=st.sampled_from([1, 2, 7, lm_data.PIECE]))
@example(train="a", valid="a", test="a", piece=1)
@example(train="\n\na\n\n", valid="b\r\n\r\n<eos>", test=" c \u2028 d\re", piece=1)
def test_corpus_equals_the_tutorials_line_by_line(folder: Path, train: str, valid: str, test: str, piece: int) -> None:
    for split, text in {"train": train, "valid": valid, "test": test}.items():
        (folder / f"{split}.txt").write_bytes(text.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_data, "PIECE", piece)
        corpus = Corpus(folder)
    words, ids = numbered_line_by_line(folder)
    assert corpus.dictionary.idx2word == words
    assert corpus.dictionary.word2idx == {word: i for i, word in enumerate(words)}
    assert len(corpus.dictionary) == len(words)
    for split in ("train", "valid", "test"):
        tokens = getattr(corpus, split)
        assert tokens.dtype == torch.int32
        assert tokens.tolist() == ids[split]


def test_a_text_of_many_pieces_equals_the_tutorials(folder: Path) -> None:
    line = " ".join(f"w{i * i % 997}" for i in range(97)) + " caf\u00e9\n"
    (folder / "train.txt").write_text(line * 600 + "\n" * 70_000 + "x" * 70_000, encoding="utf8")
    (folder / "valid.txt").write_text("new words\n")
    (folder / "test.txt").write_text("other new words")
    assert (folder / "train.txt").stat().st_size > 4 * lm_data.PIECE
    corpus = Corpus(folder)
    words, ids = numbered_line_by_line(folder)
    assert corpus.dictionary.idx2word == words
    assert {split: getattr(corpus, split).tolist() for split in ids} == ids


def test_corpus_passes_on_where_it_comes_from(folder: Path) -> None:
    for split in ("train", "valid", "test"):
        (folder / f"{split}.txt").write_text("a\n")
    texts = corpora.read(folder)
    corpus = Corpus(str(folder))
    assert (corpus.name, corpus.sha256) == (texts.name, texts.sha256)


@pytest.mark.parametrize(("words", "padded"), [(7, 8), (8, 8), (9, 16), (33_278, 33_280)])
def test_vocabulary_is_padded_to_a_multiple_of_8(words: int, padded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    train = " ".join(f"w{i}" for i in range(words - 1)) + "\n"
    monkeypatch.setattr(corpora, "read", lambda data: corpora.Texts("x", train, "w0\n", "w0\n", {}))
    corpus = Corpus("x")
    assert len(corpus.dictionary) == words
    assert corpus.vocab_size == padded


def test_an_unknown_word_has_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "read", lambda data: corpora.Texts("x", "a\n", "a\n", "a\n", {}))
    dictionary = Corpus("x").dictionary
    with pytest.raises(KeyError):
        dictionary.word2idx["b"]
    assert len(dictionary) == 2


def test_dictionary_numbers_words_once_and_in_order() -> None:
    dictionary = Dictionary(["a", "b", "a"])
    assert [dictionary.add_word(word) for word in ["b", "c", "a", "c"]] == [1, 2, 0, 2]
    assert dictionary.idx2word == ["a", "b", "c"]
    assert dictionary.word2idx == {"a": 0, "b": 1, "c": 2}
    assert len(dictionary) == 3


def test_python_docs_is_a_corpus() -> None:
    corpus = Corpus("python-docs")
    texts = corpora.read("python-docs")
    assert corpus.vocab_size % 8 == 0
    for split in ("train", "valid", "test"):
        words = [corpus.dictionary.idx2word[i] for i in getattr(corpus, split).tolist()]
        assert " ".join(words) == getattr(texts, split).replace("\n", " <eos> ").removesuffix(" ")


# Batches


@given(tokens=st.integers(0, 200), batch_size=st.integers(1, 20))
@settings(deadline=None)
def test_batchify_cuts_a_text_into_columns(tokens: int, batch_size: int) -> None:
    text = torch.arange(tokens, dtype=torch.int32)  # a token is its place in the text
    rows = tokens // batch_size
    if rows < 2:
        with pytest.raises(UsageError) as caught:
            batchify(text, batch_size, "cpu", "valid")
        line = str(caught.value)
        assert line.startswith(f"valid: {tokens} tokens are too few for a batch size of {batch_size}, ")
        assert f"at least {2 * batch_size};" in line
        assert len(line.splitlines()) == 1
        return
    source = batchify(text, batch_size, "cpu")
    assert source.dtype == torch.int32
    assert source.is_contiguous()
    assert source.shape == (rows, batch_size)
    for j in range(batch_size):
        assert source[:, j].tolist() == list(range(j * rows, (j + 1) * rows))


@given(rows=st.integers(2, 40), batch_size=st.integers(1, 7), bptt=st.integers(1, 45))
@settings(deadline=None)
def test_batches_hold_every_token_once_and_predict_its_successor(rows: int, batch_size: int, bptt: int) -> None:
    source = batchify(torch.arange(rows * batch_size, dtype=torch.int32), batch_size, "cpu")
    inputs, targets = [], []
    for i in range(0, rows - 1, bptt):
        x, y = get_batch(source, i, bptt)
        assert (x.dtype, y.dtype) == (torch.int64, torch.int64)
        seq_len = min(bptt, rows - 1 - i)
        assert x.shape == (seq_len, batch_size)
        assert y.shape == (seq_len * batch_size,)
        # Text is its own position, so the successor is the number after.
        assert [place + 1 for row in x.tolist() for place in row] == y.tolist()
        inputs += x.tolist()
        targets += y.view(seq_len, batch_size).tolist()
    assert inputs == source[:-1].tolist()
    assert targets == source[1:].tolist()


def test_batches_live_on_the_device_asked_for() -> None:
    source = batchify(torch.arange(20), 4, torch.device("meta"))
    x, y = get_batch(source, 2, 35)
    assert (x.device.type, y.device.type) == ("meta", "meta")
    assert (x.shape, y.shape) == ((2, 4), (8,))


def test_wikitext2_has_the_published_counts() -> None:
    corpus = Corpus(ROOT / corpora.DEFAULT)
    assert (len(corpus.dictionary), corpus.vocab_size) == (33_278, 33_280)
    assert (len(corpus.train), len(corpus.valid), len(corpus.test)) == (2_088_628, 217_646, 245_569)
