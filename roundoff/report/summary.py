"""The comparison as a table for the terminal, and as JSON for programs. Names from run directories are data."""

import math
import shlex
import shutil
import sys
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from roundoff.errors import printable
from roundoff.extras import needs
from roundoff.report.said import said
from roundoff.runs.jsonfile import write_json
from roundoff.runs.reading import Run
from roundoff.verdict.types import Comparison, Difference, ModeSummary, Verdict

TOKENS, MEMORY, TEST_DIFFERENCE = "tokens\n/s", "peak\nmemory", "test loss difference\n[95% interval]"
VERDICT_COLUMNS = 3
"""Mode, verdict and difference; the other columns have the details."""
LONGEST_NAME = 22
LONGEST_SENTENCE = 1000
PIPE = 100
"""The width of a table that no terminal shows."""


def columns(comparison: Comparison) -> dict[str, str]:
    """Return the heads of the table, each with the alignment of its column; the first `VERDICT_COLUMNS` judge."""
    unit = comparison.short_unit
    found = {
        "mode": "left",
        "verdict": "left",
        f"difference [95% interval]\nin {unit}" if unit else "difference\n[95% interval]": "left",
        "train\nloss": "right",
        "test\nppl" if comparison.has_perplexity else "test\nloss": "right",
        TEST_DIFFERENCE: "left",
        "differs\nat step": "right",
        "updates": "right",
        "skipped": "right",
        "final\nloss\nscale": "right",
        TOKENS: "right",
        MEMORY: "right",
    }
    if not comparison.has_test_loss:
        del found["test\nppl" if comparison.has_perplexity else "test\nloss"], found[TEST_DIFFERENCE]
    if not comparison.has_perplexity:  # a loop of one's own need not measure them
        if all(mode.tokens_per_second is None for mode in comparison.modes):
            del found[TOKENS]
        if all(mode.peak_memory_bytes is None for mode in comparison.modes):
            del found[MEMORY]
    return found


def legend(comparison: Comparison) -> list[str]:
    """Return the sentences that explain the columns."""
    tested = ""
    if comparison.has_test_loss:
        name = "ppl is exp of the mean test loss" if comparison.has_perplexity else "loss is a mean of the same kind"
        tested = f" Test {name}; the difference beside it is of test losses, and decides nothing by itself."
    return [
        "Train loss is the mean over the second half of the steps, of the seeds that have finished; its "
        f"difference to the reference's decides the verdict.{tested}",
        "Updates and skipped steps are sums over all seeds. An update is a step whose gradients were applied; a "
        "skipped step has used up its batch and changed no weight.",
        "Differs at step: the first one whose training loss differs in a bit from the reference's with the same seed. "
        "Steps count batches, skipped ones too.",
    ]


def table(comparison: Comparison) -> str:
    """Return what was found, the table with a row for each mode, and its details; nothing that a terminal would obey.

    Raises:
        UsageError: tabulate is not installed.
    """
    rows = [row(mode, comparison) for mode in comparison.modes]
    sections = {
        "Columns": legend(comparison),
        "Verdicts": [mode.verdict.sentence for mode in comparison.modes],
        "Bit-equality of the training losses": [pair.sentence for pair in comparison.pairs],
        "What this covers": comparison.covers,
        "Not finished": list(unfinished(comparison.modes)),
        "Noted in the files": list(problems(comparison.modes)),
        "Not the same job" if comparison.accepted else "Differences that the names mean": comparison.differences,
    }
    text = ["\n".join(printable(s, LONGEST_SENTENCE) for s in said(comparison)), grid(rows, columns(comparison))]
    for title, sentences in sections.items():
        if sentences:
            text.append("\n".join([f"{title}:", *(f"  {printable(s, LONGEST_SENTENCE)}" for s in sentences)]))
    return "\n\n".join(text)


def grid(rows: Sequence[Sequence[str]], columns: Mapping[str, str], width: int | None = None) -> str:
    """Return `rows` as plain text below their heads; `columns` is head -> alignment.

    The text is at most `width` wide, by default as the terminal. Where all columns do not fit, heads break into lines
    as narrow as their cells; where that is too wide too, the columns stand below each other in parts, the first one in
    each of them.
    """
    width = width or terminal_width()
    heads, alignment = list(columns), list(columns.values())
    text = _plain(rows, heads, alignment)
    if _width(text) > width:
        heads = [_broken(head, max(len(row[i]) for row in rows)) for i, head in enumerate(heads)]
        text = _plain(rows, heads, alignment)
    if _width(text) <= width:
        return text
    parts, taken = [], [0]
    for i in range(1, len(heads)):
        more = [*taken, i]
        if len(taken) > 1 and _width(_plain(*_chosen(rows, heads, alignment, more))) > width:
            parts.append(taken)
            more = [0, i]
        taken = more
    return "\n\n".join(_plain(*_chosen(rows, heads, alignment, part)) for part in [*parts, taken])


def _broken(head: str, width: int) -> str:
    """Return `head` in lines of at most `width`, or as wide as its longest word."""
    return textwrap.fill(head, max(width, *map(len, head.split())), break_long_words=False, break_on_hyphens=False)


def terminal_width() -> int:
    """Return the width of the terminal, or `PIPE` where standard output is none."""
    return shutil.get_terminal_size((PIPE, 24)).columns if sys.stdout.isatty() else PIPE


def _chosen(
    rows: Sequence[Sequence[str]], heads: list[str], alignment: list[str], part: list[int]
) -> tuple[list[list[str]], list[str], list[str]]:
    return [[row[i] for i in part] for row in rows], [heads[i] for i in part], [alignment[i] for i in part]


def _plain(rows: Sequence[Sequence[str]], heads: list[str], alignment: list[str]) -> str:
    with needs("report"):
        import tabulate
    padding, tabulate.MIN_PADDING = tabulate.MIN_PADDING, 0  # else a head is two characters wider than its words
    try:
        return tabulate.tabulate(rows, headers=heads, tablefmt="simple", disable_numparse=True, colalign=alignment)
    finally:
        tabulate.MIN_PADDING = padding


def _width(text: str) -> int:
    return max(map(len, text.splitlines()))


def row(mode: ModeSummary, comparison: Comparison) -> list[str]:
    """Return the table's row of `mode`, a text for each of `columns`."""
    cells = [
        printable(mode.label, LONGEST_NAME),
        mode.verdict.word,
        _difference(mode, mode.verdict),
        _loss(mode.end_loss),
        *_test_cells(mode, comparison),
        _first_difference(mode, comparison),
        str(mode.updates),
        str(mode.skipped),
        "-" if mode.final_loss_scale is None else f"{mode.final_loss_scale:g}",
    ]
    measured = {
        TOKENS: "-" if mode.tokens_per_second is None else f"{mode.tokens_per_second:.0f}",
        MEMORY: memory(mode.peak_memory_bytes),
    }
    return cells + [cell for name, cell in measured.items() if name in columns(comparison)]


def _loss(value: float | None, digits: str = ".4f") -> str:
    return "-" if value is None else f"{value:{digits}}" if value < 1e6 else f"{value:.3g}"


def _test_cells(mode: ModeSummary, comparison: Comparison) -> list[str]:
    """Return the cells on the test data: perplexity or loss, and difference; none where no mode has a test loss."""
    if not comparison.has_test_loss:
        return []
    end = _loss(mode.test_ppl, ".2f") if comparison.has_perplexity else _loss(mode.test_loss)
    return [end, _difference(mode, mode.test_difference)]


def _difference(mode: ModeSummary, found: Verdict | Difference | None) -> str:
    """Return a difference with its interval; that of the seeds that went well says nothing of a mode that diverged."""
    if found is None or found.difference is None or mode.verdict.word == "diverged":
        return "-"
    if found.interval is None:
        return f"{found.difference:+.4f}"
    return f"{found.difference:+.4f} [{found.interval[0]:+.4f}, {found.interval[1]:+.4f}]"


def _first_difference(mode: ModeSummary, comparison: Comparison) -> str:
    if mode.first_difference is not None:
        return str(mode.first_difference)
    reference_seeds = {run.seed for run in comparison.modes[0].runs}
    compared = mode.label != comparison.reference and any(run.seed in reference_seeds for run in mode.runs)
    return "none" if compared else "-"


def memory(count: float | None) -> str:
    """Return a number of bytes in a unit that suits it."""
    if count is None:
        return "-"
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def unfinished(modes: Iterable[ModeSummary]) -> Iterable[str]:
    """Yield a line for each run that has not finished, with its path, or with its command where it left nothing."""
    for mode in modes:
        messages = {failure.seed: f": {failure.message}" for failure in mode.failures}
        for run in mode.runs:
            if run.status != "finished":
                last, said = run.steps["step"][-1], messages.pop(run.seed, "")
                yield f"{mode.label} with seed {run.seed}: {run.status} after step {last} ({run.path}){said}"
        for failure in mode.failures:
            if failure.seed not in messages:
                continue
            command = f" (command: {shlex.join(failure.command)})" if failure.command else ""
            how = f"failed with exit code {failure.exit_code}" if failure.command else "failed"
            said = f"{how}: {failure.message}"
            yield f"{mode.label} with seed {failure.seed}: {said}{command}"


def problems(modes: Iterable[ModeSummary]) -> Iterable[str]:
    """Yield a line for each fault of the files that could be passed over, with the run's path."""
    for mode in modes:
        for run in mode.runs:
            for problem in run.problems:
                yield f"{run.path}: {problem}"


def write_summary(path: Path, comparison: Comparison) -> None:
    """Write the figures of `comparison` as one JSON object. As in the records, inf and nan are "inf" and "nan".

    The first key is `said`, the sentences that the table begins with. The others are the attributes of
    `roundoff.verdict.types`, with two exceptions. A run has only its path, seed, status, machine, versions and
    command, the rows of its epochs, test loss, number of steps, and problems. A probe has the name of the file with
    its result. An epoch's row has "train_loss" too, the mean of the finite losses of its steps, skipped ones included;
    it is null where there is none. So the file can stand for runs that are not kept. `unit` is absent where the loss
    is in nats a word, and `test_ppl` where exp of a loss is no perplexity.

    Raises:
        OSError: `path` cannot be written.
    """
    left_out = {"unit"} if comparison.has_perplexity else {"test_ppl"}
    content = (
        {"said": said(comparison)}
        | _without(left_out, vars(comparison))
        | {
            "modes": [
                _without(left_out, vars(mode))
                | {
                    "runs": [_run(run) for run in mode.runs],
                    "failures": [vars(failure) for failure in mode.failures],
                    "verdict": vars(mode.verdict),
                    "test_difference": None if mode.test_difference is None else vars(mode.test_difference),
                }
                for mode in comparison.modes
            ],
            "pairs": [vars(pair) for pair in comparison.pairs],
            "equivalences": [vars(each) | {"verdict": vars(each.verdict)} for each in comparison.equivalences],
            "probes": [
                vars(probe) | {"result": None if probe.result is None else "probe.json"} for probe in comparison.probes
            ],
        }
    )
    write_json(path, content, indent=2)


def _without(names: set[str], fields: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}


def _epoch(row: dict[str, Any], train_loss: float | None) -> dict[str, Any]:
    lr = None if math.isnan(row["lr"]) else row["lr"]  # which a loop may leave out
    return row | {"lr": lr, "train_loss": train_loss}


def _run(run: Run) -> dict[str, Any]:
    losses: dict[int, list[float]] = defaultdict(list)
    for epoch, loss in zip(run.steps["epoch"], run.steps["loss"], strict=True):
        if math.isfinite(loss):
            losses[epoch].append(loss)
    means = {epoch: fmean(of_epoch) for epoch, of_epoch in losses.items()}
    return {
        "path": run.path,
        "seed": run.seed,
        "status": run.status,
        "device_name": run.device,
        "environment": run.config["environment"],
        "epochs": [_epoch(row, means.get(row["epoch"])) for row in run.epochs],
        "test_loss": None if run.result is None else run.result["test_loss"],
        "steps": len(run.steps["step"]),
        "problems": run.problems,
    }
