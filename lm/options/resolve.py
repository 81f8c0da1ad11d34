"""The conclusions from the options that are given: values of absent ones, and contradictions."""

from collections.abc import Iterable
from dataclasses import replace

from lm.options.device_flags import device_of
from lm.options.options import DEFAULT_LR, TRANSFORMER_LR, Options, flag
from roundoff import processes
from roundoff.errors import UsageError
from roundoff.runs.listeners import Listener

OF_DYNAMIC_SCALE = ("init_scale", "scale_window")
"""The options that change nothing where the loss scale is static."""


def resolve(given: Options) -> Options:
    """Return `given` with the options that are absent and follow from others, or from this machine.

    Options that are there already stay as they are, but for a device of several processes.

    Raises:
        UsageError: options contradict each other, a package is missing, or there is no such device here.
    """
    if given.tensorboard:
        event_files()  # to refuse it before anything is written
    if given.onnx_export is not None:
        from lm.model.onnx_file import check_onnx_export  # here, since torch takes seconds

        check_onnx_export(given.onnx_export, given.save)
    _check_model(given)
    _check_accumulate(given)
    optimizer = _optimizer(given)
    dtype = _dtype(given)
    return replace(
        given,
        device=_device(given),
        optimizer=optimizer,
        lr=given.lr or default_lr(optimizer, given.model),
        dtype=dtype,
        run_dir=given.resume or given.run_dir,
    )


def without_effect(options: Options, given: Iterable[str]) -> list[str]:
    """Return those of the options `given` that change nothing in a run with the resolved `options`."""
    return [name for name in given if name in OF_DYNAMIC_SCALE and options.loss_scale is not None]


def check_effect(options: Options, given: Iterable[str]) -> None:
    """Refuse what one trainer alone is given, and would take in silence.

    Options that several trainers are given are for those that use them, as are those of a run to resume.

    Raises:
        UsageError: one of the options `given` changes nothing in a run with the resolved `options`.
    """
    if options.dynamic_loss_scale and not options.fp16 and "dynamic_loss_scale" in given:
        raise UsageError(
            "--dynamic-loss-scale without --fp16 trains in fp32, which needs no loss scale; to train in fp16 give "
            "--fp16 too, or leave it out"
        )
    for name in without_effect(options, given):
        raise UsageError(f"{flag(name)} {_why_without_effect(options)}")


def _why_without_effect(options: Options) -> str:
    """Return why an option of a dynamic loss scale changes nothing in a run with `options`, and what to do."""
    if options.script == "main":
        return (
            "with main.py, whose loss scale is static: leave it out, or use main_fp16_optimizer.py --fp16 "
            "--dynamic-loss-scale or main_amp.py"
        )
    if options.script == "main_fp16_optimizer":
        return (
            "without --dynamic-loss-scale: the loss scale is static; give --fp16 --dynamic-loss-scale too, or "
            "leave it out"
        )
    if options.static_loss_scale is not None:
        scale = f"{options.static_loss_scale:g}"
        return f"with --static-loss-scale {scale}: a static loss scale starts there and stays; give one of them"
    return f"with --dtype {options.dtype}: only float16 has a dynamic loss scale; leave it out, or give --dtype float16"


def default_lr(optimizer: str, model: str) -> float:
    """Return the learning rate of `optimizer`, a key of `DEFAULT_LR`, for a model of this kind."""
    return TRANSFORMER_LR if (optimizer, model) == ("sgd", "Transformer") else DEFAULT_LR[optimizer]


def _check_model(given: Options) -> None:
    if given.model == "Transformer":
        if given.emsize % given.nhead:
            raise UsageError(
                f"--nhead {given.nhead} with --emsize {given.emsize}: heads share the width of the embeddings; "
                "give a multiple of their number"
            )
    elif given.tied and given.emsize != given.nhid:
        raise UsageError(
            f"--tied with --emsize {given.emsize} and --nhid {given.nhid}: tied weights need both to be equal"
        )


def _device(given: Options) -> str:
    several = processes.world_size() > 1
    device = device_of(given.device, cuda=given.cuda, accel=given.accel, processes=processes.local_world_size())
    if given.tf32 and not device.startswith("cuda"):
        raise UsageError(f"--tf32 on device {device}: TF32 is a format of CUDA GPUs; leave the flag out")
    if given.batch_size % processes.world_size():
        raise UsageError(
            f"--batch_size {given.batch_size} cannot be divided among {processes.world_size()} processes; "
            "give a multiple of their number"
        )
    return f"cuda:{processes.local_rank()}" if several and device == "cuda" else device


def _check_accumulate(given: Options) -> None:
    several = processes.world_size()
    columns = given.batch_size // several
    if columns and given.accumulate > columns:
        each = f" in {several} processes" if several > 1 else ""
        raise UsageError(
            f"--accumulate {given.accumulate} with --batch_size {given.batch_size}{each}: each part needs a column of "
            f"its own; give at most {columns}"
        )


def _optimizer(given: Options) -> str:
    if given.use_optimizer and given.optimizer not in (None, "adamw"):
        raise UsageError(
            f"--use-optimizer (AdamW) and --optimizer {given.optimizer} contradict each other: give one of them"
        )
    return given.optimizer or ("adamw" if given.use_optimizer else "sgd")


def _dtype(given: Options) -> str:
    if given.script != "main_amp":
        return "float16" if given.fp16 else "float32"
    if given.fp16 and given.dtype not in (None, "float16"):
        raise UsageError(f"--fp16 and --dtype {given.dtype} contradict each other: give one of them")
    if given.opt_level is not None and given.dtype == "float32":
        raise UsageError(
            f"--opt-level {given.opt_level} with --dtype float32: {given.opt_level} is a level of half precision; "
            "leave one of them out, or give --dtype float16 or bfloat16"
        )
    return given.dtype or "float16"


def event_files() -> Listener:
    """Return the listener that --tensorboard asks for.

    Raises:
        UsageError: TensorBoard is not installed.
    """
    try:
        from roundoff.runs.event_files import EventFiles
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] in ("roundoff", "torch"):
            raise
        raise UsageError(
            f"--tensorboard without TensorBoard (no {error.name} here): pip install 'roundoff[tensorboard]', "
            "or leave the flag out (--no-tensorboard, where the resumed run has it): steps.jsonl in the run directory "
            "has the same numbers"
        ) from None
    return EventFiles()
