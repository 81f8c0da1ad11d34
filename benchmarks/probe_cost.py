"""The time of a probe of the language model, beside that of as many training steps."""

import statistics

import probe
from benchmarks.measure import REFERENCE, Cost, Row, compared, interleaved
from benchmarks.processes import fresh
from benchmarks.trainers import trainer
from benchmarks.training import own_step
from lm.launch.probing import sources
from lm.launch.probing.run import run_probe
from lm.options.modes import PROBED

BATCHES = 32
ROUNDS = 2
FLUSH_LIMIT = 1e-3  # as by default


def measure_probe(data: str, size: int, rounds: int) -> list[Row]:
    """Measure the probe's seconds in fresh processes, and its ratio to `BATCHES` training steps in fp32."""
    times: dict[str, list[float]] = {REFERENCE: [], "probe": []}
    with trainer("fp32", data, size) as job:
        step = own_step(job)
        for _ in range(min(ROUNDS, rounds)):
            each = interleaved({"step": step}, rounds)["step"]
            times[REFERENCE].append(BATCHES * statistics.median(each))
            times["probe"] += fresh(probe_once, data, size, BATCHES).seconds
    return rows_of_probe(size, times)


def probe_once(data: str, size: int, batches: int) -> Cost:
    """Probe fresh weights in the default modes; return what it took without the reading of the text."""
    source = sources.fresh(data, ["--emsize", str(size), "--nhid", str(size)])
    result = run_probe(source, list(PROBED), batches, FLUSH_LIMIT, [], probe.precisions())
    return Cost([result["seconds"]], result["peak_memory_bytes"] / 2**20)


def rows_of_probe(size: int, times: dict[str, list[float]]) -> list[Row]:
    """Return the rows of `times`, in which the reference is `BATCHES` training steps."""
    (row,) = compared("probe", size, times, faster=False)
    name = f"{BATCHES} batches, {len(PROBED)} modes"
    shortest = {"part": "probe", "size": size, "name": f"{name}, shortest", "value": min(times["probe"]), "unit": "s"}
    return [row | {"name": name, "ratio_is": "probe / as many fp32 steps"}, shortest]
