"""Time and memory to read a corpus: `lm.data.Corpus` against the loop of the PyTorch tutorial.

    python -m benchmarks.data [--data DIR] [--rounds N]

The two run in turn, and each ratio is of two neighbours, so that a machine that slows down slows both. The
time is the processor's, so that other programs count less.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lm import corpora
from lm.data import Corpus, Dictionary
from lm.errors import exit_code


def tutorial(folder: str) -> list[Tensor]:
    """Two passes over each file: number the words, then a list of ids and a tensor for each line."""
    dictionary = Dictionary()
    texts = []
    for split in corpora.SPLITS:
        path = Path(folder, f"{split}.txt")
        with path.open(encoding="utf8") as lines:
            for line in lines:
                for word in [*line.split(), "<eos>"]:
                    dictionary.add_word(word)
        with path.open(encoding="utf8") as lines:
            tensors = []
            for line in lines:
                ids = []
                for word in [*line.split(), "<eos>"]:
                    ids.append(dictionary.word2idx[word])
                tensors.append(torch.tensor(ids, dtype=torch.int64))
        texts.append(torch.cat(tensors))
    return texts


def ours(folder: str) -> list[Tensor]:
    """Read the same with `Corpus`."""
    corpus = Corpus(folder)
    return [corpus.train, corpus.valid, corpus.test]


def seconds(reader: Callable[[str], list[Tensor]], folder: str) -> float:
    """Processor time of one reading."""
    start = time.process_time()
    reader(folder)
    return time.process_time() - start


def peak_mib(reader: Callable[[str], list[Tensor]], folder: str) -> float:
    """Peak resident memory of one reading in this process, above what it had before (Linux: /proc)."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    before = status("VmRSS")
    reader(folder)
    return (status("VmHWM") - before) / 1024


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--data", default=corpora.DEFAULT, help="a folder with train.txt, valid.txt, test.txt")
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    mine = ours(args.data)  # first, since it fetches what is missing
    assert all(torch.equal(a, b) for a, b in zip(tutorial(args.data), mine, strict=True))
    times = [(seconds(tutorial, args.data), seconds(ours, args.data)) for _ in range(args.rounds)]
    for name, values, unit in [
        ("tutorial", [a for a, _ in times], "s"),
        ("Corpus", [b for _, b in times], "s"),
        ("Corpus / tutorial", [b / a for a, b in times], ""),
    ]:
        spread = f"min {min(values):.3f}  median {statistics.median(values):.3f}  max {max(values):.3f}"
        print(f"{name:18} {spread} {unit}")

    if Path("/proc/self/status").exists():
        for name, reader in [("tutorial", tutorial), ("Corpus", ours)]:
            with multiprocessing.get_context("spawn").Pool(1) as fresh:
                print(f"{name:18} peak {fresh.apply(peak_mib, (reader, args.data)):.0f} MiB")
    return 0


if __name__ == "__main__":
    raise SystemExit(exit_code(main))
