"""Step time and peak memory of training, over the sizes of the language model.

The text is random, so that any vocabulary can be had without a file of it.
"""

import math
from contextlib import ExitStack
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import reference
from benchmarks.beside import Beside, Calls
from benchmarks.growth.axes import GrowthAxis
from benchmarks.measure import REFERENCE, WARM_UP, Cost, interleaved
from lm.data.corpus import Corpus, Dictionary, batchify
from roundoff.device import peak_memory_bytes

VARIANTS = (REFERENCE, "fp32", "amp-bf16")
ROUNDS = 5
BPTT = 35
EVALUATED = 100  # words of the texts for evaluation, which nobody reads here


class Sizes(NamedTuple):
    """The sizes of a model and of its batch."""

    vocabulary: int = 33_280
    hidden: int = 200
    batch: int = 20
    layers: int = 2


class RandomText(Corpus):
    """A corpus of random words of a vocabulary of any size, some of them frequent, by Zipf's law.

    Zipf's law: the k-th word has a share of text in proportion to 1/k. Only numbers of words are there, no texts.
    """

    def __init__(self, vocabulary: int, words: int) -> None:
        self.name, self.sha256, self.dictionary = "random", {}, Dictionary()
        self.vocab_size = vocabulary
        self.train, self.valid, self.test = (_zipf(vocabulary, count) for count in (words, EVALUATED, EVALUATED))


def _zipf(vocabulary: int, count: int) -> Tensor:
    """Draw `count` numbers from 0 on, below `vocabulary`."""
    draws = torch.rand(count, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return (draws * math.log(vocabulary)).exp().int() - 1


@cache  # the default sizes are on every axis
def measure_sizes(sizes: Sizes) -> dict[str, Cost]:
    """Measure some steps of each variant in turn, each in a fresh process, and the peak memory of that process."""
    with ExitStack() as stack:
        jobs = {name: Beside(stack, make_job, "cpu", name, sizes) for name in VARIANTS}
        seconds = interleaved({name: job.call("step") for name, job in jobs.items()}, ROUNDS)
        return {name: Cost(seconds[name], job.call("peak")() / 2**20) for name, job in jobs.items()}


def make_job(stack: ExitStack, device: str, name: str, sizes: Sizes) -> Calls:
    """Build the variant `name`; see `benchmarks.beside.Make`."""
    rows = (WARM_UP + ROUNDS) * BPTT + 1
    corpus = RandomText(sizes.vocabulary, rows * sizes.batch)
    peak = {"peak": lambda: peak_memory_bytes(device)}
    if name == REFERENCE:
        data = batchify(corpus.train, sizes.batch, device)
        job = reference.Trainer(data, sizes.vocabulary, sizes.hidden, BPTT, sizes.layers)
        starts = iter(range(0, rows - 1, BPTT))
        return peak | {"step": lambda: job.step(next(starts))}
    from benchmarks.trainers import trainer  # here: the memory of the reference's process has none of the trainers
    from benchmarks.training import own_step

    more = {"batch_size": sizes.batch, "nlayers": sizes.layers, "bptt": BPTT}
    return peak | {"step": own_step(stack.enter_context(trainer(name, corpus, sizes.hidden, device, **more)))}


AXES = {
    "vocabulary": GrowthAxis(
        "words of the vocabulary",
        (1_000, 4_000, 16_000, 33_280, 64_000, 128_000, 250_000),
        lambda value: measure_sizes(Sizes(vocabulary=value)),
    ),
    "hidden": GrowthAxis("hidden units", (100, 200, 400, 800, 1_500), lambda value: measure_sizes(Sizes(hidden=value))),
    "batch": GrowthAxis(
        "columns of the batch", (5, 10, 20, 40, 80, 160), lambda value: measure_sizes(Sizes(batch=value))
    ),
    "layers": GrowthAxis("layers", (1, 2, 4, 8), lambda value: measure_sizes(Sizes(layers=value))),
}
