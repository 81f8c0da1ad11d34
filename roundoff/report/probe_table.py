"""The probe as a table for the terminal. Names from its file are data."""

from roundoff.errors import printable
from roundoff.gradients.advice import said
from roundoff.report import probe_view as view
from roundoff.report.probe_view import Result
from roundoff.report.summary import LONGEST_SENTENCE, grid

COLUMNS = {  # header -> alignment
    "mode": "left",
    "error\nto noise": "right",
    "bias": "right",
    "flush\nbias": "right",
    "flushed": "right",
    "subnormal": "right",
    "inf": "right",
    "stagnated": "right",
}
FORWARD = {
    "mode": "left",
    "critical\nbatch": "right",
    "output": "left",
    "mean\ndifference": "right",
    "largest\ndifference": "right",
}
OUTPUTS = {
    "mode": "left",
    "gradient of": "left",
    "flushed": "right",
    "subnormal": "right",
    "overflowed": "right",
}
FORWARD_LEGEND = (
    "Critical batch: so many of these batches in one have as little noise as the mode has bias; - where the bias "
    "cannot be told from 0. Difference: of an output of the forward pass from the reference's, in the output's unit."
)
LEGEND = [
    "Error to noise: root mean square of the gradient's error, over the standard deviation of the float64 gradient "
    "from batch to batch.",
    "Bias: length of the mean error, over that of the mean gradient; flush bias: that of the flushed elements alone.",
    "Flushed (became 0), subnormal, inf (overflowed): shares of the elements that are not 0 in float64.",
    "Stagnated: share of the updates under half a unit in the last place of a weight in the mode's dtype: what "
    "fp32 master weights keep.",
    "+-: standard error, from the number of batches.",
]
ROWS = "A row a mode, over all parameters; below it its parameter tensor with the largest error to noise."
BOTH = {
    "flushed": "Flushed at a static loss scale, predicted / measured, most first",
    "overflowed": "Overflowed at a static loss scale, predicted / measured, most first",
}
LONGEST_NAME = 22
LONGEST_GRID = 12
"""The most tensors of which the terminal shows prediction beside measurement."""


def table(result: Result, explained: bool = True) -> str:
    """Return what to take, the table, which fits the terminal, and its sentences; nothing that a terminal would obey.

    Args:
        result: what `roundoff.gradients.result.read_probe` returns.
        explained: with the meaning of the columns, and predictions beside measurements.

    Raises:
        UsageError: tabulate is not installed.
    """
    rows = [cells for mode in view.modes(result) for cells in _rows(result, mode)]
    sections: dict[str, list[str]] = {}
    if explained:
        sections["Columns"] = [ROWS, *LEGEND, FORWARD_LEGEND]
        for what, title in BOTH.items():
            heads, pairs = side_by_side(result, what)
            sections[title] = grid(pairs[:LONGEST_GRID], heads).splitlines() if pairs else []
    sections["Advice"] = result["advice"]
    if explained:
        sections["What the figures do not cover"] = result["covers"]
    first = printable(said(result), LONGEST_SENTENCE)
    text = [f"{first}\n{about(result)}\n{noise(result)}", grid(rows, COLUMNS)]
    if rows := forward(result):
        text.append(grid(rows, FORWARD))
    if not result["scales"]["measured"] and (rows := outputs(result)):
        text.append(grid(rows, OUTPUTS))
    for title, lines in sections.items():
        if lines:
            text.append("\n".join([f"{title}:", *(f"  {printable(line, LONGEST_SENTENCE)}" for line in lines)]))
    return "\n\n".join(text)


def outputs(result: Result) -> list[list[str]]:
    """Return a row for each mode and output of a submodule: the shares of its gradient, see `OUTPUTS`."""
    names = [tensor["name"] for tensor in result["tensors"] if tensor["kind"] == "boundary"]
    return [
        [view.short(printable(mode), LONGEST_NAME), view.short(printable(name))]
        + [percent(found["tensors"][name][share]) for share in ("flushed", "subnormal", "overflowed")]
        for mode, found in result["modes"].items()
        for name in names
    ]


def forward(result: Result) -> list[list[str]]:
    """Return a row for each mode and output of the forward pass: see `FORWARD`."""
    rows = []
    for mode, found in result["modes"].items():
        batch = found["total"]["critical_batch"]
        first = [view.short(printable(mode), LONGEST_NAME), "-" if batch is None else f"{batch:.2g}"]
        for name, figures in found["forward"].items():
            differences = ["not finite" if x is None else _number(x) for x in (figures["mean"], figures["largest"])]
            rows.append([*first, view.short(printable(name)), *differences])
            first = ["", ""]
    return rows


def _rows(result: Result, mode: str) -> list[list[str]]:
    found = [[view.short(printable(mode), LONGEST_NAME), *row(result, mode)]]
    worst = view.worst(result, mode)
    if worst is not None:
        found.append([f"worst {view.short(printable(worst), LONGEST_NAME - 6)}", *row(result, mode, worst)])
    return found


def row(result: Result, mode: str, tensor: str | None = None) -> list[str]:
    """Return a text for each of `COLUMNS` but the first: of `tensor` in `mode`, or of all parameters."""
    found = view.figures(result, mode, tensor)
    shares = ("flushed", "subnormal", "overflowed", "stagnated")
    return [
        _with_error(found["error_to_noise"], found["error_to_noise_error"]),
        _with_error(found["bias"], found["bias_error"]),
        _number(found["bias_flushed"]),
        *(percent(found[name]) for name in shares),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else "0" if value == 0 else f"{value:.1e}"


def _with_error(value: float | None, error: float | None) -> str:
    if not value or error is None:
        return _number(value)
    return f"{_number(value)} +-{100 * (error / value):.0f}%" if error / value < 10 else f"{_number(value)} +->999%"


def percent(share: float | None) -> str:
    """Return a share from 0 to 1 as a few characters; only 0 is shown as 0%, and only 1 as 100%."""
    if share is None:
        return "-"
    if 0 < share < 1e-5:
        return "<.001%"
    if 0.9995 <= share < 1:
        return ">99.9%"
    return f"{100 * share:.3g}%" if share >= 0.1 else f"{100 * share:.2g}%"


def about(result: Result) -> str:
    """Return the sentence on what was probed."""
    return printable(result["about"], LONGEST_SENTENCE)


def noise(result: Result) -> str:
    """Return the sentence on the gradient itself."""
    total = result["total"]
    return (
        f"Mean gradient of all parameters: length {_number(total['gradient'])}; "
        f"standard deviation from batch to batch (noise): {_with_error(total['noise'], total['noise_error'])}."
    )


def side_by_side(result: Result, what: str) -> tuple[dict[str, str], list[list[str]]]:
    """Return header -> alignment, and a row for each tensor with its share `what` of `BOTH`, predicted / measured.

    The largest share comes first. A tensor in which nothing overflows has no row on overflow.
    """
    scales = result["scales"]
    heads = {"tensor": "left"}
    heads |= {f"{view.short(printable(m['mode']), 18)}\nat 2**{m['k']}": "right" for m in scales["measured"]}
    found: list[tuple[float, list[str]]] = []
    for name in view.tensors(result) if scales["measured"] else []:
        shares = scales["predicted"][name][what]
        pairs = [(shares[scales["k"].index(m["k"])], m["tensors"][name][what]) for m in scales["measured"]]
        cells = [f"{percent(first)} / {percent(second)}" for first, second in pairs]
        most = max(share or 0.0 for pair in pairs for share in pair)
        if most > 0 or what == "flushed":
            found.append((most, [view.short(printable(name)), *cells]))
    return heads, [cells for _, cells in sorted(found, key=lambda entry: -entry[0])]
