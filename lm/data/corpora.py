"""Where a corpus comes from: a folder, WikiText-2 fetched and verified, or the built-in text."""

import hashlib
import os
import re
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from pydoc_data.topics import __file__ as topics_file
from pydoc_data.topics import topics as python_topics
from typing import NamedTuple

import pooch  # type: ignore[import-untyped]
import requests
from tqdm import tqdm

from roundoff.cli import OneLineParser, add_version, complete
from roundoff.errors import UsageError
from roundoff.program import exit_code

DEFAULT = "./data/wikitext-2"
BUILT_IN = "python-docs"
SPLITS = ("train", "valid", "test")

# WikiText-2 of Merity et al. 2016, "Pointer Sentinel Mixture Models" (CC BY-SA), as the PyTorch word language
# model example ships it. The address names a commit, so what it serves cannot change.
WIKITEXT2_URL = (
    "https://raw.githubusercontent.com/pytorch/examples/acc295dc7b90714f1bf47f06004fc19a7fe235c4"
    "/word_language_model/data/wikitext-2/"
)
WIKITEXT2_SHA256 = {
    "train.txt": "9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
    "valid.txt": "f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
    "test.txt": "d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
}
TIMEOUT = (10.0, 30.0)  # seconds: to connect, and between two arrivals of data

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

    `data` is "python-docs" for the built-in text, or a folder with train.txt, valid.txt and test.txt in
    UTF-8. When it is the default folder and that is not there, WikiText-2 is fetched into it first.

    Raises UsageError: folder or file missing, unreadable, not UTF-8 or without a word; fetching failed.
    """
    if str(data) == BUILT_IN:
        return python_docs()
    folder = Path(data)
    texts, sha256 = {}, {}
    try:
        is_default = os.path.realpath(folder) == os.path.realpath(DEFAULT)
        if is_default and not folder.exists():
            fetch_wikitext2(folder)
        _check_folder(folder, is_default)
        for split in SPLITS:
            texts[split], sha256[split] = _read_file(folder / f"{split}.txt")
    except OSError as error:
        raise UsageError(f"--data {data}: cannot read {error.filename}: {error.strerror}") from error
    return Texts(folder.resolve().name, **texts, sha256=sha256)


def find(place: str) -> str:
    """The corpus that `place` is or holds: itself, WikiText-2 in it, or the only corpus in it.

    A folder of corpora that would hold the default one, though it is not there yet, gives that one.

    Raises UsageError: it holds several.
    """
    folder = Path(place)
    default = folder / Path(DEFAULT).name
    if place == BUILT_IN or any((folder / f"{split}.txt").exists() for split in SPLITS):
        return place
    if default.is_dir() or os.path.realpath(default) == os.path.realpath(DEFAULT):
        return str(default)
    held = sorted({path.parent for path in folder.glob("*/train.txt")})
    if len(held) > 1:
        raise UsageError(f"{place} holds the corpora {', '.join(path.name for path in held)}; give one of them")
    return str(held[0]) if held else place


def _check_folder(folder: Path, is_default: bool) -> None:
    wanted = f"give a folder with train.txt, valid.txt and test.txt, or --data {BUILT_IN} for the built-in text"
    if not folder.exists():
        raise UsageError(f"--data {folder}: there is no such folder; {wanted}")
    if not folder.is_dir():
        raise UsageError(f"--data {folder}: this is a file; {wanted}")
    missing = [f"{split}.txt" for split in SPLITS if not (folder / f"{split}.txt").exists()]
    if missing:
        # Nothing is fetched over what is there: it may be a user's own text.
        remedy = "add what is missing, or remove the folder to have WikiText-2 fetched" if is_default else wanted
        raise UsageError(f"--data {folder}: the folder has no {' and no '.join(missing)}; {remedy}")


def _read_file(path: Path) -> tuple[str, str]:
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


def fetch_wikitext2(folder: str | Path, base_url: str = WIKITEXT2_URL) -> None:
    """Fetch the three files of WikiText-2 (13 MB) from `base_url`, which ends in "/", into the new `folder`.

    All or nothing: the files are fetched and verified by SHA-256 in a temporary folder beside `folder`, and
    one rename puts them in place. Any failure, Ctrl-C too, leaves nothing behind. If another process puts
    the folder there in the meantime, it stays as it is. On a terminal, stderr shows a progress bar for each
    file.

    Raises UsageError: a file not reached, cut off or not the pinned one; a folder that cannot be written.
    """
    folder = Path(folder).absolute()
    pooch.get_logger().setLevel("WARNING")  # by default it prints on stderr what it fetches, and from where
    try:
        with (
            _made(folder.parent),
            tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch,
        ):
            complete = Path(scratch, folder.name)
            for name, sha256 in WIKITEXT2_SHA256.items():
                _fetch(base_url + name, name, sha256, complete)
            try:
                complete.rename(folder)
            except OSError:
                if not folder.is_dir():
                    raise
    except OSError as error:
        raise _not_fetched(f"cannot write {error.filename or folder}: {error.strerror or error}") from error


def _fetch(url: str, name: str, sha256: str, folder: Path) -> None:
    # A length of 1 until pooch learns the true one from the server: it asks for the bar's truth value before
    # that, and a bar without a length has none. No rate in the format: pooch empties and refills the bar at
    # the end, which makes it gigabytes a second. disable=None: no bar unless stderr is a terminal.
    bar_format = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}B"
    with tqdm(total=1, desc=name, unit_scale=True, bar_format=bar_format, disable=None) as bar:
        # Uncompressed: the server announces compressed bytes, and the bar would count uncompressed ones.
        downloader = pooch.HTTPDownloader(
            progressbar=bar, chunk_size=1 << 16, timeout=TIMEOUT, headers={"Accept-Encoding": "identity"}
        )
        try:
            path = pooch.retrieve(url, f"sha256:{sha256}", fname=name, path=folder, downloader=downloader)
        except requests.HTTPError as error:
            error.response.close()  # pooch leaves it open
            raise _not_fetched(f"{url}: the server answered {error.response.status_code}") from error
        except requests.exceptions.ChunkedEncodingError as error:
            raise _not_fetched(f"{url}: the connection was cut in the middle of the file") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise _not_fetched(f"{url}: the server cannot be reached or stopped answering") from error
        except requests.RequestException as error:
            raise _not_fetched(f"{url}: {type(error).__name__}") from error
        except ValueError as error:
            raise _not_fetched(f"{url}: the file is corrupted, its SHA-256 is not the pinned one") from error
    Path(path).chmod(0o644)  # pooch makes it 0600, which nobody else could read in a shared folder


def _not_fetched(what: str) -> UsageError:
    return UsageError(
        f"WikiText-2 could not be fetched: {what}; try again, or put train.txt, valid.txt and test.txt into "
        f"a folder and give it with --data, or use --data {BUILT_IN}, which needs no network"
    )


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make `folder` and its parents; if the block fails, take those made here away again."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):  # not made, or in use by someone else
                path.rmdir()
        raise


def python_docs() -> Texts:
    """Build the built-in corpus from `pydoc_data.topics`, Python's own reference, which every Python ships.

    Real English and code without a network, small enough (about 114,000 words) for a run of minutes. It is
    the same on every machine for one version of Python, and differs between versions, as the reference does:
    compare perplexities on it only where the digests in `sha256` agree.
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


def _where() -> dict[str, str]:
    """Each known corpus -> where it is on this machine, or how to have it."""
    folder = Path(DEFAULT)
    name = folder.name
    known = {name: f"not here; python -m lm.data.corpora {name} fetches it into {folder.absolute()} (13 MB)"}
    if folder.exists():
        try:
            sha256 = read(folder).sha256
            own = any(sha256[split] != WIKITEXT2_SHA256[f"{split}.txt"] for split in SPLITS)
            known[name] = f"{folder.absolute()}{' (not the published text)' if own else ''}"
        except UsageError as error:
            known[name] = f"damaged: {error}"
    for path in sorted(folder.parent.glob("*/train.txt")):
        known.setdefault(path.parent.name, str(path.parent.absolute()))
    return known | {BUILT_IN: f"built in; made of {topics_file} of this Python"}


def main() -> int:
    """List the known corpora, or fetch one."""
    parser = OneLineParser(
        "python -m lm.data.corpora", description="List the known corpora and where each is, or fetch one by its name."
    )
    add_version(parser)
    parser.add_argument("name", nargs="?", help="corpus to fetch, if it is not here yet")
    complete(parser)
    name = parser.parse_args().name
    known = _where()
    if name is not None and name not in known:
        raise UsageError(f"{name!r} is no known corpus; there are {', '.join(known)}")
    if name == Path(DEFAULT).name and not Path(DEFAULT).exists():
        fetch_wikitext2(DEFAULT)
        known = _where()
    for each in known if name is None else [name]:
        print(f"{each:12}  {known[each]}")
    return 0


if __name__ == "__main__":
    sys.exit(exit_code(main))
