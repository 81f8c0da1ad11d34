"""Where a corpus comes from: a folder of three text files, or the built-in text."""

import hashlib
import re
from collections import Counter
from pathlib import Path
from pydoc_data.topics import topics as python_topics
from typing import NamedTuple

from roundoff.errors import UsageError

DEFAULT = "./data/wikitext-2"
BUILT_IN = "python-docs"
SPLITS = ("train", "valid", "test")

MIN_COUNT = 3  # the built-in text: a word seen less often is <unk>
SHARES = {"train": 0.85, "valid": 0.07, "test": 0.08}  # the built-in text: of the words


class Texts(NamedTuple):
    r"""A corpus as text: words separated by whitespace, lines ended by "\n" and nothing else."""

    name: str
    train: str
    valid: str
    test: str
    sha256: dict[str, str]
    """Split -> hex digest of the file's bytes; for the built-in corpus, of the text in UTF-8."""


def read(data: str | Path) -> Texts:
    """Read the corpus that `--data` names.

    `data` is "python-docs" for the built-in text, or a folder with train.txt, valid.txt and test.txt in UTF-8.

    Raises UsageError: folder or file missing, unreadable, not UTF-8 or without a word.
    """
    if str(data) == BUILT_IN:
        return python_docs()
    folder = Path(data)
    texts, sha256 = {}, {}
    try:
        _check_folder(folder)
        for split in SPLITS:
            texts[split], sha256[split] = _read_file(folder / f"{split}.txt")
    except OSError as error:
        raise UsageError(f"--data {data}: cannot read {error.filename}: {error.strerror}") from error
    return Texts(folder.resolve().name, **texts, sha256=sha256)


def find(place: str) -> str:
    """Return the corpus that `place` is or holds: itself, WikiText-2 in it, or the only corpus in it.

    Raises UsageError: it holds several.
    """
    folder = Path(place)
    default = folder / Path(DEFAULT).name
    if place == BUILT_IN or any((folder / f"{split}.txt").exists() for split in SPLITS):
        return place
    if default.is_dir():
        return str(default)
    held = sorted({path.parent for path in folder.glob("*/train.txt")})
    if len(held) > 1:
        raise UsageError(f"{place} holds the corpora {', '.join(path.name for path in held)}; give one of them")
    return str(held[0]) if held else place


def _check_folder(folder: Path) -> None:
    """Raise UsageError unless `folder` has the three files of a corpus."""
    wanted = f"give a folder with train.txt, valid.txt and test.txt, or --data {BUILT_IN} for the built-in text"
    if not folder.exists():
        raise UsageError(f"--data {folder}: there is no such folder; {wanted}")
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: this is a file; {wanted}")
    missing = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").exists()]
    if missing:
        raise UsageError(f"--data {folder}: the folder has no {' and no '.join(missing)}; {wanted}")


def _read_file(path: Path) -> tuple[str, str]:
    """Return the text of a file, and the SHA-256 of its bytes."""
    raw = path.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        at = f"byte 0x{raw[error.start]:02x} at offset {error.start}"
        raise UsageError(f"{path}: the file is not UTF-8 ({at}); convert it to UTF-8") from error
    if not text or text.isspace():
        raise UsageError(f"{path}: the file is empty; it must have at least one word")
    # The line ends of Python's text mode, so that a file written on any system gives the same words.
    return text.replace("\r\n", "\n").replace("\r", "\n"), hashlib.sha256(raw).hexdigest()


def python_docs() -> Texts:
    """Build the built-in corpus from `pydoc_data.topics`, Python's own reference, which every Python ships.

    The text is English and code, some 114,000 words: enough for a run of minutes. It is the same on every machine
    with one version of Python. Other versions have another reference, so perplexities on it may be compared only
    where the digests in `sha256` agree.
    """
    docs = {topic: _tokenised(text) for topic, text in sorted(python_topics.items())}
    split_of = _split_by_topic(docs)
    # As in WikiText-2: a word too rare to be learned would only enlarge the vocabulary.
    counts = Counter(word for lines in docs.values() for line in lines for word in line.split())
    texts = dict.fromkeys(SPLITS, "")
    for topic, lines in docs.items():
        for line in lines:
            words = (word if counts[word] >= MIN_COUNT else "<unk>" for word in line.split())
            texts[split_of[topic]] += " ".join(words) + "\n"
    sha256 = {split: hashlib.sha256(text.encode()).hexdigest() for split, text in texts.items()}
    return Texts(BUILT_IN, **texts, sha256=sha256)


def _tokenised(text: str) -> list[str]:
    """Separate words and punctuation by spaces, as in WikiText-2, so that "x," is the word "x" and a comma.

    Blank lines go: they would teach no more than that <eos> may follow <eos>.
    """
    return [" ".join(re.findall(r"\w+|[^\w\s]", line)) for line in text.splitlines() if line.strip()]


def _split_by_topic(docs: dict[str, list[str]]) -> dict[str, str]:
    """Choose each topic's split: whole topics, so that no test sentence continues a training sentence.

    Some topics are parts of others ("while" stands in "compound" word for word). Both go to train, or the
    test perplexity would measure memory.
    """
    lines = {topic: set(text) for topic, text in docs.items()}
    train_only = set()
    for part in docs:
        for whole in docs:
            if part != whole and 2 * len(lines[part] & lines[whole]) > len(lines[part]):
                train_only |= {part, whole}
    sizes = {topic: sum(len(line.split()) for line in text) for topic, text in docs.items()}
    room = {split: share * sum(sizes.values()) for split, share in SHARES.items()}
    split_of = {}
    # Then the largest first, each to where most is lacking: the small ones at the end even the shares out.
    for topic in sorted(docs, key=lambda topic: (topic not in train_only, -sizes[topic], topic)):
        split_of[topic] = "train" if topic in train_only else max(SPLITS, key=lambda split: room[split])
        room[split_of[topic]] -= sizes[topic]
    return split_of
