"""The corpus as token ids, and the batches that a language model trains on."""

from array import array
from collections import defaultdict
from collections.abc import Iterable
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from lm.data import corpora
from roundoff.errors import UsageError

EOS = "<eos>"
PIECE = 1 << 16  # characters split into words at a time; more is no faster and takes memory


class Dictionary:
    """Words numbered in order of first appearance: `word2idx[idx2word[i]] == i`."""

    def __init__(self, words: Iterable[str] = ()) -> None:
        self.word2idx: dict[str, int] = {}
        self.idx2word: list[str] = []
        for word in words:
            self.add_word(word)

    def add_word(self, word: str) -> int:
        """Return the word's number, a new one if it has none yet."""
        if word not in self.word2idx:
            self.word2idx[word] = len(self.idx2word)
            self.idx2word.append(word)
        return self.word2idx[word]

    def __len__(self) -> int:
        return len(self.idx2word)


class Corpus:
    """The corpus that `data` names, read and numbered; raises the UsageError of `corpora.read`.

    Every line ends in the word <eos>, also a blank one and a last one without a newline. Words are numbered
    in order of first appearance over train, valid and test.

    name        what the corpus is called in records
    sha256      split -> hex digest of its text
    dictionary  the words
    train, valid, test
                int32 token ids on the CPU, shape (tokens,)
    vocab_size  length of the dictionary rounded up to a multiple of 8: tensor cores want the dimensions of
                half matrices to be so (NVIDIA, "Train With Mixed Precision"); the ids on top are no words
    """

    def __init__(self, data: str | Path) -> None:
        texts = corpora.read(data)
        self.name = texts.name
        self.sha256 = texts.sha256
        numbers: defaultdict[str, int] = defaultdict(count().__next__)
        self.train = _token_ids(texts.train, numbers)
        self.valid = _token_ids(texts.valid, numbers)
        self.test = _token_ids(texts.test, numbers)
        self.dictionary = Dictionary(numbers)
        self.vocab_size = (len(self.dictionary) + 7) // 8 * 8


def _token_ids(text: str, numbers: defaultdict[str, int]) -> Tensor:
    """Number the words of `text`; `numbers` gives an unseen word the next number by itself.

    No Python statement runs for each word or line, so this is fast. Memory stays low: words exist as strings while
    their piece is read, and an id takes 4 bytes.
    """
    ids = array("i")
    start = 0
    while start < len(text):
        end = text.find("\n", start + PIECE) + 1 or len(text)
        words = text[start:end].replace("\n", f" {EOS} ").split()
        ids.fromlist(list(map(numbers.__getitem__, words)))
        start = end
    if not text.endswith("\n"):
        ids.append(numbers[EOS])
    return torch.frombuffer(ids, dtype=torch.int32)


def batchify(data: Tensor, batch_size: int, device: str | torch.device, split: str = "train") -> Tensor:
    """Cut a text into `batch_size` columns of equal length, which a model reads side by side.

    data   whole numbers of any dtype, shape (tokens,)
    split  "train", "valid" or "test", for the error
    Returns a tensor of shape (tokens // batch_size, batch_size) on `device`, in the dtype of `data`. Column j is the
    j-th part of the text, read downwards. Up to batch_size - 1 tokens at the end are left out.

    Raises UsageError where there would be fewer than 2 rows: a token and its successor to predict.
    """
    rows = len(data) // batch_size
    if rows < 2:
        remedy = "more text or a smaller --batch_size" if split == "train" else "more text"
        raise UsageError(
            f"{split}: {len(data)} tokens are too few for a batch size of {batch_size}, which needs at least "
            f"{2 * batch_size}; give {remedy}"
        )
    return data[: rows * batch_size].view(batch_size, rows).t().contiguous().to(device)


def get_batch(source: Tensor, i: int, bptt: int) -> tuple[Tensor, Tensor]:
    """Take `bptt` rows of `source` from row `i` on, or as many as have a successor, and their successors.

    source  whole numbers, shape (rows, batch_size), from `batchify`; 0 <= i < rows - 1
    Returns the input, shape (seq_len, batch_size), and the target, shape (seq_len * batch_size,), both int64,
    with seq_len = min(bptt, rows - 1 - i).
    """
    seq_len = min(bptt, len(source) - 1 - i)
    rows = source[i : i + seq_len + 1].long()  # what the loss takes; a whole text in it would be twice as large
    return rows[:-1], rows[1:].view(-1)
