"""Every option of the three trainers, once: its name, type, default, bounds and help."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from lm.data.corpora import BUILT_IN, DEFAULT
from lm.model.kinds import KINDS
from roundoff.cli import finite_above_0, invalid_choice, nearest, number, whole
from roundoff.errors import UsageError, printable

SCRIPTS = ("main", "main_fp16_optimizer", "main_amp")
OPT_LEVELS = ("O1", "O2")
DTYPES = ("float16", "bfloat16", "float32")
SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
FP16_STATIC_LOSS_SCALE = 128.0

DEFAULT_LR = {"sgd": 20.0, "adamw": 0.001}
"""Optimizer -> learning rate. AdamW's steps have that size whatever the size of the gradient: 20 is far off."""
SCHEDULES = ("anneal", "cosine", "constant")
TRANSFORMER_LR = 5.0
"""The learning rate of plain SGD for a Transformer, as the PyTorch example advises."""

# The bounds leave the reciprocal of the scale in the range of fp32 too.
loss_scale = number(float, 2.0**-100, 2.0**127, what="a number above 0, from 2**-100 to 2**127")


def dtype_name(text: str) -> str:
    """Return the name that torch has for a dtype; an argparse type, which leaves unknown names as they are."""
    return SHORT_DTYPES.get(text, text)


@dataclass(frozen=True)
class Option:
    """How one option is read and shown.

    Attributes:
        group: heading of the option in --help.
        kind: reads a text, or raises argparse.ArgumentTypeError. `bool` makes a switch.
        help: what --help, Sacred and the documentation say.
        metavar: name of the value in --help.
        choices: the values that are allowed; None allows all that `kind` reads.
        scripts: the trainers that have the option.
        otherwise: what --help says of a default that follows from other options.
        may_change: whether a resumed run may be given another value.
        alias: the option that this one is another way to ask for. An alias is no part of what a run records.
    """

    group: str
    kind: Callable[[str], Any]
    help: str
    metavar: str | None = None
    choices: tuple[str, ...] | None = None
    scripts: tuple[str, ...] = SCRIPTS
    otherwise: str | None = None
    may_change: bool = False
    alias: str | None = None


def option(group: str, kind: Callable[[str], Any], default: Any, help: str, **facts: Any) -> Any:
    """Declare a field of `Options`."""
    return field(default=default, metadata={"option": Option(group, kind, help, **facts)})


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of one run of a trainer.

    `lm.options.config` makes it. None means absent. In what `parse_args` and `make_args` return, `optimizer`, `lr`,
    `dtype` and `device` are never absent.
    """

    script: str

    data: str = option(
        "data",
        str,
        DEFAULT,
        f"folder with train.txt, valid.txt and test.txt; {BUILT_IN} is text that comes with Python",
        metavar="FOLDER",
        may_change=True,
    )
    batch_size: int = option("data", whole, 20, "columns of text side by side", metavar="COLUMNS")
    bptt: int = option("data", whole, 35, "words that gradients flow back through", metavar="WORDS")

    model: str = option("model", str, "LSTM", "kind of layer", choices=KINDS)
    emsize: int = option("model", whole, 200, "size of the word embeddings", metavar="UNITS")
    nhid: int = option("model", whole, 200, "hidden units a layer", metavar="UNITS")
    nlayers: int = option("model", whole, 2, "layers between embedding and decoder", metavar="LAYERS")
    nhead: int = option("model", whole, 2, "heads of the attention; only a Transformer has them", metavar="HEADS")
    dropout: float = option(
        "model",
        number(float, 0, 1, below=True),
        0.2,
        "probability of dropping a unit in training",
        metavar="PROBABILITY",
    )
    tied: bool = option("model", bool, False, "share the embedding with the decoder")

    accumulate: int = option(
        "training",
        whole,
        1,
        "compute each batch in this many parts, some columns at a time, for less memory; their gradients add up",
        metavar="PARTS",
    )
    optimizer: str = option(
        "training",
        str,
        None,
        "plain SGD, or AdamW with its weight decay of 0.01",
        choices=tuple(DEFAULT_LR),
        otherwise="sgd",
    )
    use_optimizer: bool = option("training", bool, False, "the same as --optimizer adamw", alias="optimizer")
    lr: float = option(
        "training",
        finite_above_0,
        None,
        "initial learning rate",
        metavar="RATE",
        otherwise=f"{DEFAULT_LR['sgd']:g} for sgd, {TRANSFORMER_LR:g} if it trains a Transformer; "
        f"{DEFAULT_LR['adamw']:g} for adamw",
    )
    lr_schedule: str = option(
        "training",
        str,
        "anneal",
        "divide --lr by 4 after each validation that brings nothing (anneal), let it fall to 0 along a cosine over "
        "all steps that --epochs and --max-steps set, which a resumed run then keeps, or leave it constant",
        choices=SCHEDULES,
    )
    warmup: int = option(
        "training",
        number(int, 0),
        0,
        "let the learning rate rise to that of the schedule over this many steps, each by the same amount",
        metavar="STEPS",
    )
    clip: float = option(
        "training",
        number(float, 0, above=True),
        0.25,
        "largest L2 norm of all gradients together; inf for no clipping",
        metavar="NORM",
    )
    epochs: int = option(
        "training", whole, 40, "passes over the training text, at most", metavar="EPOCHS", may_change=True
    )
    seed: int = option("training", number(int, 0, 2**63 - 1), 1111, "seed of every random number", metavar="NUMBER")
    max_steps: int | None = option(
        "training", whole, None, "stop after this many batches, then evaluate", metavar="STEPS", may_change=True
    )
    dry_run: bool = option(
        "training", bool, False, "one batch of training and of each evaluation, to see that all works"
    )
    max_skipped: int = option(
        "training",
        whole,
        50,
        "give up after this many steps in a row with a non-finite loss or gradient",
        metavar="STEPS",
    )
    cuda: bool = option("training", bool, False, "the same as --device cuda", alias="device")
    accel: bool = option("training", bool, False, "run on this machine's accelerator: CUDA, XPU or MPS", alias="device")
    device: str = option("training", str, None, "cpu, cuda, cuda:N, xpu or mps", metavar="DEVICE", otherwise="cpu")
    deterministic: bool = option("training", bool, False, "allow no operation that can differ between runs")

    fp16: bool = option("precision", bool, False, "train in float16; in main_amp.py, the same as --dtype float16")
    dtype: str = option(
        "precision",
        dtype_name,
        None,
        "dtype of products under autocast; float32 means no autocast; fp16, bf16 and fp32 are taken too",
        choices=DTYPES,
        scripts=("main_amp",),
        otherwise="float16",
    )
    opt_level: str | None = option(
        "precision",
        str,
        None,
        "train as apex.amp did, in the place of autocast and GradScaler; O1: fp32 weights and casts around torch's "
        "functions; O2: half weights with fp32 masters",
        choices=OPT_LEVELS,
        scripts=("main_amp",),
    )
    dynamic_loss_scale: bool = option(
        "precision", bool, False, "with --fp16; supersedes --static-loss-scale", scripts=("main_fp16_optimizer",)
    )
    fp16_utils: str = option(
        "precision",
        str,
        "own",
        "this project's, or an old apex's",
        choices=("own", "apex"),
        scripts=("main_fp16_optimizer",),
    )
    static_loss_scale: float | None = option(
        "precision",
        loss_scale,
        None,
        "factor that the loss is multiplied by; powers of two are exact",
        metavar="FACTOR",
        otherwise=f"{FP16_STATIC_LOSS_SCALE:g} with --fp16, else 1; of main_amp.py: dynamic in float16, else 1",
    )
    init_scale: float = option(
        "precision",
        loss_scale,
        2.0**16,
        "a dynamic loss scale starts here; a static one has none of it",
        metavar="FACTOR",
    )
    scale_window: int = option(
        "precision",
        whole,
        2000,
        "a dynamic loss scale doubles after this many steps in a row without overflow; a static one has none of it",
        metavar="STEPS",
    )
    tf32: bool = option("precision", bool, False, "let a GPU round fp32 products to TF32 (CUDA only)")

    log_interval: int = option(
        "records",
        whole,
        200,
        "batches from one line of the log to the next",
        metavar="BATCHES",
        may_change=True,
    )
    tensorboard: bool = option(
        "records",
        bool,
        False,
        "write event files into the run directory too, for tensorboard --logdir runs",
        may_change=True,
    )
    save: Path = option(
        "records", Path, Path("model.safetensors"), "the best model goes here", metavar="FILE", may_change=True
    )
    onnx_export: Path | None = option(
        "records",
        Path,
        None,
        "write it as ONNX too, with the same weights in fp32, checked with onnxruntime against the model itself",
        metavar="FILE",
        may_change=True,
    )
    run_dir: Path | None = option(
        "records", Path, None, "records of this run go here", metavar="DIR", otherwise="runs/<mode>-<time>"
    )
    checkpoint_interval: int | None = option(
        "records",
        whole,
        None,
        "write a checkpoint after this many steps too, not only after each epoch and when the run is stopped",
        metavar="STEPS",
        may_change=True,
    )
    resume: Path | None = option(
        "records",
        Path,
        None,
        "go on with the run recorded there, from its last checkpoint and with its flags; flags given again must agree, "
        "but for --data, --epochs, --max-steps, --log-interval, --tensorboard, --save, --onnx-export, "
        "--checkpoint-interval",
        metavar="RUN_DIR",
    )

    @property
    def loss_scale(self) -> float | None:
        """The static loss scale: the one that is given, or the default of the mode. None: it is dynamic."""
        if self.dynamic_loss_scale:
            return None
        if self.static_loss_scale is not None:
            return self.static_loss_scale
        if self.dtype != "float16":
            return 1.0
        return None if self.script == "main_amp" else FP16_STATIC_LOSS_SCALE


def options_of(script: str | None) -> dict[str, Field[Any]]:
    """Return the options of the trainer `script`, in the order of --help; None: of all trainers."""
    found = {f.name: f for f in fields(Options) if "option" in f.metadata}
    return {name: f for name, f in found.items() if script is None or script in option_of(f).scripts}


def option_of(f: "Field[Any]") -> Option:
    """Return the facts of the option that the field `f` holds."""
    found: Option = f.metadata["option"]
    return found


MAY_CHANGE = tuple(name for name, f in options_of(None).items() if option_of(f).may_change)
"""What a resumed run may be given anew: where it ends, what it shows, and where its files are now."""


def alias_of(script: str, name: str) -> str | None:
    """Return the option that the trainer's option `name` is another way to ask for, if it is one."""
    return "dtype" if (script, name) == ("main_amp", "fp16") else option_of(options_of(script)[name]).alias


def help_of(f: "Field[Any]") -> str:
    """Return what is said of an option, with a default that follows from other options."""
    facts = option_of(f)
    text = facts.help.replace("MAY_CHANGE", ", ".join(map(flag, MAY_CHANGE)))
    return f"{text} (default: {facts.otherwise})" if facts.otherwise else text


def flag(name: str) -> str:
    """Return the option `name` as the command line has it."""
    return "--batch_size" if name == "batch_size" else f"--{name.replace('_', '-')}"


def whose(name: str, script: str | None = None) -> str | None:
    """Return whose option the flag `name` is, such as "--dtype", for who gave it to `script`; None if nobody's.

    A flag of `script` itself, and one of all three trainers, is no mistake.
    """
    if name == "--bf16":  # as other projects have it
        return "bfloat16 is main_amp.py --dtype bf16"
    f = options_of(None).get(name.removeprefix("--").removeprefix("no-").replace("-", "_"))
    if f is None or option_of(f).scripts == SCRIPTS or script in option_of(f).scripts:
        return None
    return f"{name} is an option of {' and '.join(f'{other}.py' for other in option_of(f).scripts)}"


def words(values: Mapping[str, Any]) -> list[str]:
    """Return `values`, by option, as the words of a command line, to start a process with."""
    found = []
    for name, value in values.items():
        if isinstance(value, bool):
            found.append(flag(name) if value else f"--no-{name.replace('_', '-')}")
        elif value is not None:
            found.append(f"{flag(name)}={value}")
    return found


def checked(script: str | None, content: Mapping[str, Any]) -> dict[str, Any]:
    """Return `content`, a value for each name, with every value as `Options` holds it and without those that are None.

    Names are spelt with "-" or "_".

    Raises:
        UsageError: a name is no option's or is there twice, or a value is no option's.
    """
    known = options_of(script)
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            near = nearest(name, known)
            advice = f"did you mean {near}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"there is no option {printable(repr(key))}; {whose(flag(name)) or advice}")
        if name in values:
            raise UsageError(f"{printable(repr(key))} stands there twice, with - and with _")
        values[name] = None if value is None else _checked(name, option_of(known[name]), value)
    return {name: value for name, value in values.items() if value is not None}


def _checked(name: str, facts: Option, value: Any) -> Any:
    where = f"argument {flag(name)}:"
    if facts.kind is bool:
        if not isinstance(value, bool):
            raise UsageError(f"{where} {printable(repr(value))} is neither true nor false")
        return value
    if isinstance(value, dict | list | tuple):
        raise UsageError(f"{where} {printable(repr(value))} is not one value")
    text = str(value)  # a number from a file is judged as the same digits on a command line are
    try:
        found = facts.kind(text)
    except argparse.ArgumentTypeError as error:
        raise UsageError(f"{where} {printable(error, 300)}") from None
    if facts.choices is not None and found not in facts.choices:
        raise UsageError(f"{where} {invalid_choice(text, facts.choices)}")
    return found


def as_values(options: Options) -> dict[str, Any]:
    """Return `options` as config.json holds them: plain values, without aliases and the run that was resumed."""
    known = options_of(options.script)
    left_out = {"resume", *(name for name in known if alias_of(options.script, name))}
    values = {name: value for name, value in asdict(options).items() if name not in left_out}
    return {name: str(value) if isinstance(value, Path) else value for name, value in values.items()}
