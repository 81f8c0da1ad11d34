"""The part "facts": what torch and cuDNN do on this device, where it decides how this project must be."""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.packages import BASE, version
from benchmarks.gpu.report import Report, one_line
from benchmarks.gpu.settings import Settings
from lm.model import recurrent
from lm.model.language_model import RNNModel
from roundoff.device import cudnn_version, device_name, driver_version, set_tf32

HALVES = (torch.bfloat16, torch.float16)
CUDNN: Any = torch.backends.cudnn
ROUNDED_ONCE = 1.1
"""The largest error of a product with fp32 sums, in units of the largest error of one rounding."""


def run(report: Report, settings: Settings) -> None:
    """Ask everything; each question on its own."""
    device = settings.device
    with report.guarded("versions"):
        versions(report, device)
    if not settings.small:
        set_tf32(False)
    for kind in ("LSTM", "GRU", "RNN"):
        with report.guarded(f"dtypes of {kind}"):
            layer_dtypes(report, device, kind)
    with report.guarded("dropout masks"):
        dropout_masks(report, device)
    with report.guarded("the generator's state"):
        generator_states(report, device)
    sizes = (70, 3328, 20) if settings.small else (700, 33280, 200)
    for half in HALVES:
        with report.guarded(f"products in {name_of(half)}"):
            half_sums(report, device, half, sizes)


def versions(report: Report, device: str) -> None:
    """Report what the machine is, and what is installed."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": cudnn_version(),
        "driver": driver_version(),
        "device": device_name(device),
        "packages": {name: version(name) for name in ("numpy", "pytest", "pytest-xdist", *BASE)},
        "default_half_sums": torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
    }
    if device != "cpu":
        properties = torch.cuda.get_device_properties(device)
        facts["capability"] = f"{properties.major}.{properties.minor}"
        facts["memory_bytes"] = properties.total_memory
        facts["multiprocessors"] = properties.multi_processor_count
    for name, value in facts.items():
        report.figure(f"{name}: {value}", name=name, value=value)


def layer_dtypes(report: Report, device: str, kind: str) -> None:
    """Report the dtype that torch's own layer and this project's return under autocast."""
    for half in HALVES:
        name, where = name_of(half), f"under autocast in {name_of(half)}"
        plain = _attempt(lambda half=half: _dtype_of(_plain(kind, device), None, device, half))  # type: ignore[misc]
        if device == "cpu":  # which layers a CPU runs in half hangs on its instructions
            report.figure(f"torch.nn.{kind} {where}: {plain}", name=f"torch.nn.{kind} {where}", value=plain)
        else:
            _check_plain(report, f"torch.nn.{kind} {where} returns", plain, name, casts_bfloat16_to_float16(device))
        own = _attempt(lambda half=half: _dtype_of(_own(kind, device), half, device, half))  # type: ignore[misc]
        report.check(f"this project's {kind} {where} returns", own, name, required=True)


def _check_plain(report: Report, question: str, found: str, asked: str, casts: bool) -> None:
    """Report the dtype of torch's own layer; `casts`: torch makes float16 of bfloat16."""
    if asked == "bfloat16" and casts:
        means = (
            "the doubt is right: torch computes this layer in float16, without a loss scale",
            "the doubt is wrong: torch keeps to the dtype that was asked for",
        )
        report.check(question, found, "float16", means=means)
    else:
        report.check(question, found, asked, means=("", "torch does not keep to the dtype that was asked for"))


def casts_bfloat16_to_float16(device: str) -> bool:
    """Return whether torch hands recurrent layers in bfloat16 to cuDNN, in front of which autocast casts to float16."""
    if device == "cpu":
        return False
    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    new = numbers >= (2, 10) and (CUDNN.version() or 0) >= 91300
    return new and torch.cuda.get_device_capability(device) >= (8, 0)


def _plain(kind: str, device: str) -> nn.RNNBase:
    layer: nn.RNNBase = getattr(nn, kind)(16, 16, 2).to(device)
    return layer


def _own(kind: str, device: str) -> nn.RNNBase:
    layer: nn.RNNBase = getattr(recurrent, kind)(16, 16, 2).to(device)
    return layer


def _dtype_of(layer: nn.RNNBase, state_dtype: torch.dtype | None, device: str, half: torch.dtype) -> str:
    """Return the dtype of output and state under autocast, "a and b" where they differ; None: no state is given."""
    x = torch.randn(5, 8, 16, device=device)
    with torch.autocast(torch.device(device).type, half):
        if state_dtype is None:
            output, state = layer(x.to(half))  # as a model hands it over; fp32 would go to cuDNN in every version
        else:
            zeros = torch.zeros(2, 8, 16, device=device, dtype=state_dtype)
            output, state = layer(x.to(state_dtype), (zeros, zeros) if layer.mode == "LSTM" else zeros)
    dtypes = dict.fromkeys(map(name_of, (output.dtype, *(s.dtype for s in _states(state)))))
    output.float().sum().backward()
    return " and ".join(dtypes)


def _states(state: Any) -> tuple[Tensor, ...]:
    return state if isinstance(state, tuple) else (state,)


def dropout_masks(report: Report, device: str) -> None:
    """Report whether one seed draws the same dropout masks in every dtype, twice in a row."""

    def masks(dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
        torch.manual_seed(1)
        ones = torch.ones(shape, dtype=dtype, device=device)
        return torch.stack([F.dropout(ones, 0.2) != 0 for _ in range(2)])

    for shape in ((35, 20, 200), (35, 20, 1500), (3, 5, 7)):
        expected = masks(torch.float32, shape)
        other = [name_of(half) for half in HALVES if not torch.equal(masks(half, shape), expected)]
        found = f"others in {' and '.join(other)}" if other else "the same"
        size = " x ".join(map(str, shape))
        report.check(
            f"dropout masks of {size} numbers in float16 and bfloat16, beside float32", found, "the same", required=True
        )


def generator_states(report: Report, device: str) -> None:
    """Report whether the generator's state decides the masks between recurrent layers, as a resumed run needs it."""
    x = torch.ones(5, 8, 32, device=device)
    plain = nn.LSTM(32, 32, 2, dropout=0.5).to(device).train()
    model = RNNModel("LSTM", 64, 32, 32, 2, 0.5).to(device).train()
    tokens = torch.zeros(5, 8, dtype=torch.int64, device=device)
    lost = device != "cpu" and CUDNN.is_available()
    means = (
        "the doubt is right: cuDNN keeps a state of its own, which no checkpoint can hold",
        "the generator's state holds all: a checkpoint can hold it",
    )
    _after_state_is_put_back(
        report, device, "torch.nn.LSTM with dropout", lambda: plain(x)[0], lost, means if lost else ("", "")
    )
    _after_state_is_put_back(
        report, device, "this project's model", lambda: model.features(tokens, model.init_hidden(8))[0], None
    )


def _after_state_is_put_back(
    report: Report,
    device: str,
    what: str,
    step: Callable[[], Tensor],
    lost: bool | None,
    means: tuple[str, str] = ("", ""),
) -> None:
    """Report whether `step` repeats itself once the generator's state is put back; `lost` None: it must."""
    torch.manual_seed(3)
    steps, states = [], [_state(device)]
    for _ in range(2):
        steps.append(step())
        states.append(_state(device))
    for place, i in (("before its first step", 0), ("between two steps", 1)):
        _put_back(states[i], device)
        same = torch.equal(step(), steps[i]) and torch.equal(_state(device), states[i + 1])
        report.check(
            f"{what}, once the generator's state from {place} is put back, draws",
            "the same masks" if same else "other masks",
            "other masks" if lost and i == 1 else "the same masks",
            required=lost is None,
            means=means if i == 1 else ("", ""),
        )


def _state(device: str) -> Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def _put_back(state: Tensor, device: str) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


def half_sums(report: Report, device: str, half: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Report the error of a product with few results and long sums, with half sums allowed and without."""
    rows, inner, columns = sizes
    torch.manual_seed(5)
    left = torch.randn(rows, inner, device=device).to(half)
    right = torch.randn(inner, columns, device=device).to(half)
    exact = left.double() @ right.double()
    once = _largest_error((left.float() @ right.float()).to(half), exact)
    switch = f"allow_{'fp16' if half is torch.float16 else 'bf16'}_reduced_precision_reduction"
    before = getattr(torch.backends.cuda.matmul, switch)
    for allowed in (True, False):
        setattr(torch.backends.cuda.matmul, switch, allowed)
        error = _largest_error(left @ right, exact)
        doubted = allowed and device != "cpu"
        report.figure(
            f"{rows} x {inner} x {columns} in {name_of(half)}, {switch} {allowed}: largest error {error:.3g}, "
            f"of fp32 sums rounded once {once:.3g}, largest result {float(exact.abs().max()):.4g}",
            name=switch,
            allowed=allowed,
            error=error,
            rounded_once=once,
        )
        report.check(
            f"a {name_of(half)} product with {switch} {allowed} is off by",
            f"{error / once:.2f} roundings",
            f"more than {ROUNDED_ONCE} roundings" if doubted else f"at most {ROUNDED_ONCE} roundings",
            as_expected=(error > ROUNDED_ONCE * once) == doubted,
            means=(
                ("the doubt is right: by default sums are rounded to half", "sums are fp32 here, by default too")
                if doubted
                else ("", "sums are rounded to half all the same")
            ),
        )
    setattr(torch.backends.cuda.matmul, switch, before)


def _largest_error(product: Tensor, exact: Tensor) -> float:
    return float((product.double() - exact).abs().max())


def _attempt(question: Callable[[], str]) -> str:
    """Return the answer to `question`, or what stood in its way."""
    try:
        return question()
    except RuntimeError as error:
        return one_line(error)


def name_of(dtype: torch.dtype) -> str:
    """Return the name of a dtype, such as "bfloat16"."""
    return str(dtype).removeprefix("torch.")
