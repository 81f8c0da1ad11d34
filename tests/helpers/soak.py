"""Long runs of tiny models with many faults, as a program, so that nothing but the run itself decides its memory.

Reads lines of JSON, each a list [mode, folder], from stdin; after each run prints its exit code as a line. Every run
is a fork of this process, which has imported torch and done nothing with it. It leaves FOLDER/run, and in
FOLDER/memory.json the bytes of resident memory after each step whose number is a multiple of 100.
"""

import contextlib
import json
import math
import os
import random
import resource
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo  # which the first step of an optimizer would import, in every run anew

import jobs
from faults import Plan, put_into

STEPS = 10_000
MEASURE_EVERY = 100
MAX_SKIPPED = 301
WINDOW = 16
SIZE = [
    *("--model", "RNN_TANH", "--emsize", "4", "--nhid", "4", "--nlayers", "1", "--bptt", "2", "--batch_size", "2"),
    *("--lr", "0.5", "--dropout", "0", "--log-interval", "200"),
]
FLAGS = [*SIZE, "--max-steps", str(STEPS), "--epochs", "99"]
VALUES = (math.inf, -math.inf, math.nan)
PLACES = ("loss", "encoder", "rnn", "scores", "encoder.weight", "rnn.weight_hh_l0", "rnn.bias_ih_l0", "decoder.bias")


def plan() -> Plan:
    """Steps that have to be skipped: one in 22 at random, 300 in a row from step 2001 on, 49 from step 6001 on.

    The 300 take a dynamic scale to its minimum. A quiet time after each streak lets it grow to a useful size again;
    the seed is one with which it never becomes so large that gradients overflow by themselves.
    """
    choice = random.Random(27)
    quiet = {*range(2001, 4001), *range(6001, 6851)}
    steps = {step for step in range(2, STEPS + 1) if choice.random() < 0.045} - quiet
    steps |= {*range(2001, 2301), *range(6001, 6050)}
    return {step: (choice.choice(PLACES), choice.choice(VALUES)) for step in sorted(steps)}


def run(mode: str, folder: Path) -> int:
    """One run, to its exit code."""
    torch.set_num_threads(1)
    script, *flags = jobs.MODES[mode]
    flags += jobs.if_dynamic(mode, "--init-scale", "1", "--scale-window", str(WINDOW))
    memory = []

    def measure(step: int, *rest: Any) -> None:
        if step % MEASURE_EVERY == 0:
            memory.append(int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize())

    corpus = jobs.write_corpus(folder / "corpus", words=11, lines=1000)
    with pytest.MonkeyPatch.context() as monkeypatch:
        put_into(monkeypatch, script, plan(), measure)
        code = jobs.run(monkeypatch, corpus, folder / "run", script, *flags, *FLAGS, "--max-skipped", str(MAX_SKIPPED))
    (folder / "memory.json").write_text(json.dumps(memory))
    return code


def main() -> None:
    """See the module's docstring."""
    for line in sys.stdin:
        mode, folder = json.loads(line)
        child = os.fork()
        if child == 0:
            with (Path(folder) / "output.txt").open("w") as output, contextlib.redirect_stdout(output):
                code = run(mode, Path(folder))
            os._exit(code)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
