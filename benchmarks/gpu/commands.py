"""The part "commands": what a user types, on the whole corpus, for some hundred steps."""

from benchmarks.gpu.report import Report
from benchmarks.gpu.settings import Settings
from benchmarks.gpu.trainers import Run, Trainers

COMMANDS = (
    ("main.py",),
    ("main.py", "--tf32"),
    ("main.py", "--fp16"),
    ("main_fp16_optimizer.py", "--fp16"),
    ("main_fp16_optimizer.py", "--fp16", "--dynamic-loss-scale"),
    ("main_amp.py",),
    ("main_amp.py", "--dtype", "bfloat16"),
    ("main_amp.py", "--model", "Transformer"),
    ("main_amp.py", "--optimizer", "adamw"),
)
ON_A_CPU = (COMMANDS[0], COMMANDS[4], COMMANDS[6])
STEPS, FEW_STEPS = 400, 8
APART = 1.1
"""The ratio within which the perplexities of one model and one optimizer must be."""


def run(report: Report, settings: Settings) -> None:
    """Run each command, then lay their perplexities side by side."""
    trainers = Trainers(settings)
    perplexities: dict[str, float] = {}
    for command in ON_A_CPU if settings.small else COMMANDS:
        shown = " ".join((*command, "--device cpu" if settings.small else "--cuda"))
        with report.guarded(shown):
            steps = FEW_STEPS if settings.small else STEPS
            done = trainers.train(shown.replace(" ", "_"), *command, "--max-steps", str(steps))
            record(report, shown, done)
            if not {"Transformer", "adamw"} & set(command):
                perplexities[shown] = float(done.result()["test_ppl"])
    if perplexities:
        check_perplexities(report, perplexities)


def record(report: Report, shown: str, done: Run) -> None:
    """Report the figures of one run, and whether its dtypes are those asked for."""
    config, result = done.config(), done.result()
    precision = config["precision"]
    scale = done.rows("steps.jsonl")[-1]["loss_scale"]
    report.figure(
        f"{shown}: {result['tokens_per_second'] or 0:,.0f} tokens/s, test ppl {float(result['test_ppl']):.1f}, "
        f"{result['skipped']} skipped, scale {scale:g}, {result['peak_memory_bytes'] / 2**20:,.0f} MiB, "
        f"{done.seconds:.1f} s",
        name=shown,
        seconds=done.seconds,
        loss_scale=scale,
        dtypes=precision["dtypes"],
        environment=config["environment"],
        **{name: result[name] for name in ("test_ppl", "steps", "skipped", "tokens_per_second", "peak_memory_bytes")},
    )
    ran = {name: precision["dtypes"][name] for name in ("logits", "hidden") if name in precision["dtypes"]}
    wrong = {name: dtype for name, dtype in ran.items() if dtype != precision["dtype"]}
    found = ", ".join(f"{name} in {dtype}" for name, dtype in wrong.items()) or precision["dtype"]
    report.check(f"{shown} runs in", found, precision["dtype"], required=True)


def check_perplexities(report: Report, perplexities: dict[str, float]) -> None:
    """Report whether the modes train alike."""
    best, worst = (of(perplexities, key=perplexities.__getitem__) for of in (min, max))
    ratio = perplexities[worst] / perplexities[best]
    report.check(
        "test perplexities of the LSTM under plain SGD, the largest over the smallest",
        f"{ratio:.3f} ({worst}, {best})",
        f"at most {APART}",
        as_expected=ratio <= APART,
    )
