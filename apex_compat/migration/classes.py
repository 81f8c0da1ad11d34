"""Says what apex's classes and functions outside amp are in torch."""

from __future__ import annotations

import ast
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

from apex_compat.migration.names import Reference
from apex_compat.migration.source import Source
from apex_compat.not_offered import why_not


@dataclass(frozen=True)
class Rule:
    """How a call of apex becomes one of torch.

    Attributes:
        torch: torch's name.
        remark: where it differs.
        positional: how many leading arguments mean the same.
        ignored: arguments that change no number.
        only: arguments that torch does not have, with the one value that it means.
        added: arguments that torch needs to do the same, unless they are given.
        alone: True if the name can be replaced where it is not called, as in isinstance.
    """

    torch: str
    remark: str = ""
    positional: int = 1
    ignored: tuple[str, ...] = ()
    only: Mapping[str, object] = field(default_factory=dict)
    added: dict[str, str] = field(default_factory=dict)
    alone: bool = False


_GRADS = ("set_grad_none",)
_BATCH_NORM = {"channel_last": False, "fuse_relu": False}
RULES = {
    "apex.parallel.DistributedDataParallel": Rule(
        "torch.nn.parallel.DistributedDataParallel",
        "torch divides gradients by the number of processes before it sums them, apex after: last digits differ",
        ignored=(
            *("message_size", "delay_allreduce", "allreduce_trigger_params", "retain_allreduce_buffers"),
            *("num_allreduce_streams", "allreduce_communicators", "prof"),
        ),
        only={"allreduce_always_fp32": False, "gradient_average": True, "gradient_predivide_factor": 1.0},
        added={"broadcast_buffers": "False"},
    ),
    "apex.parallel.SyncBatchNorm": Rule("torch.nn.SyncBatchNorm", positional=6, only=_BATCH_NORM, alone=True),
    "apex.parallel.convert_syncbn_model": Rule(
        "torch.nn.SyncBatchNorm.convert_sync_batchnorm", positional=2, only={"channel_last": False}, alone=True
    ),
    "apex.optimizers.FusedAdam": Rule(
        "torch.optim.AdamW",
        "last digits differ; fused=True makes it fast on a GPU",
        positional=2,
        ignored=(*_GRADS, "capturable"),
        only={"bias_correction": True, "adam_w_mode": True, "amsgrad": False, "master_weights": False},
        added={"weight_decay": "0.0"},
    ),
    "apex.optimizers.FusedSGD": Rule(
        "torch.optim.SGD",
        "fused=True makes it fast on a GPU",
        positional=6,
        ignored=(*_GRADS, "materialize_master_grads"),
        only={"wd_after_momentum": False},
    ),
    "apex.optimizers.FusedAdagrad": Rule(
        "torch.optim.Adagrad", positional=2, ignored=_GRADS, only={"adagrad_w_mode": False}
    ),
    "apex.normalization.FusedLayerNorm": Rule(
        "torch.nn.LayerNorm", positional=3, ignored=("memory_efficient",), alone=True
    ),
    "apex.normalization.FusedRMSNorm": Rule(
        "torch.nn.RMSNorm",
        "of half-precision input with fp32 weights it is slow, and warns on the CPU",
        positional=3,
        ignored=("memory_efficient",),
        added={"eps": "1e-5"},
    ),
    "apex.normalization.MixedFusedLayerNorm": Rule(
        "torch.nn.LayerNorm",
        "of half-precision input it returns half precision, where apex returned the dtype of the weights",
        positional=2,
        ignored=("memory_efficient",),
    ),
    "apex.normalization.MixedFusedRMSNorm": Rule(
        "torch.nn.RMSNorm",
        "of half-precision input it returns half precision, where apex returned the dtype of the weights",
        positional=2,
        ignored=("memory_efficient",),
        added={"eps": "1e-5"},
    ),
}

_LAMB = "torch has none; apex_compat.optimizers keeps it"
REMARKS = {
    "apex.parallel.LARC": "torch has none; apex_compat.parallel keeps it",
    "apex.parallel.Reducer": "torch.distributed.all_reduce of each gradient; apex_compat.parallel keeps it",
    "apex.parallel.create_syncbn_process_group": "torch.distributed.new_subgroups(group_size=...)",
    "apex.optimizers.FusedLAMB": _LAMB,
    "apex.optimizers.FusedNovoGrad": _LAMB,
    "apex.optimizers.FusedMixedPrecisionLamb": _LAMB,
    "apex.fp16_utils": "autocast and GradScaler, with fp32 weights; the README of apex_compat has it call by call",
    "apex.multi_tensor_apply": "the functions torch._foreach_*; apex_compat keeps it",
    "apex.mlp": "torch.nn.Sequential of Linear and ReLU; the names in a state dict differ",
    "apex.fused_dense": "torch.nn.Linear, and torch.nn.functional.gelu between two",
    "apex.RNN": "torch.nn.LSTM, GRU and RNN",
    "apex.normalization": "torch.nn.functional.layer_norm and rms_norm; their eps is 1e-5, apex's functions had 1e-6",
    "amp_C": "the functions torch._foreach_*; apex_compat keeps it",
    "apex_C": "torch.cat and torch.split; apex_compat keeps it",
}


def remark_for(name: str) -> str:
    """Return what `name` is in torch, where no rule says it."""
    for known, remark in REMARKS.items():
        if name == known or name.startswith(f"{known}."):
            return remark
    return why_not(name) or "apex_compat keeps it"


def rewrite(source: Source, reference: Reference) -> tuple[bool, str]:
    """Change a use of apex to one of torch, if it is mechanical.

    Returns:
        True if it was changed, and the remark.
    """
    rule = RULES.get(reference.name)
    if rule is None:
        return False, remark_for(reference.name)
    if reference.called is None:
        if not rule.alone:
            return False, f"{rule.torch}, whose defaults differ: see to the arguments where it is called"
        source.replace(reference.node, rule.torch)
        return True, _with(rule.torch, rule.remark)
    if reference.name == "apex.optimizers.FusedAdam" and _literal(reference.called, "adam_w_mode") is False:
        rule = Rule("torch.optim.Adam", rule.remark, 2, rule.ignored, {**rule.only, "adam_w_mode": False})
    problem = _problem(reference.called, rule)
    if problem:
        return False, f"{rule.torch}, but {problem}; apex_compat keeps it"
    source.replace(reference.node, rule.torch)
    _rewrite_arguments(source, reference.called, rule)
    return True, _with(rule.torch, rule.remark)


def _problem(call: ast.Call, rule: Rule) -> str:
    """Return what torch cannot do of the call, or an empty text."""
    if len(call.args) > rule.positional or any(isinstance(arg, ast.Starred) for arg in call.args):
        return f"only the first {rule.positional} positional arguments mean the same: name the others"
    if not call.args:
        return "its first argument has a name of its own"
    for keyword in call.keywords:
        if keyword.arg and keyword.arg in rule.only and _literal(call, keyword.arg) != rule.only[keyword.arg]:
            return f"it has only what {keyword.arg}={rule.only[keyword.arg]} means"
    return ""


def _rewrite_arguments(source: Source, call: ast.Call, rule: Rule) -> None:
    """Leave out and add arguments. The others stay as they are: there may be apex's calls in them."""
    given: list[ast.expr | ast.keyword] = sorted([*call.args, *call.keywords], key=source.start)
    last = given[0]
    for before, argument in pairwise(given):
        if isinstance(argument, ast.keyword) and argument.arg in (*rule.ignored, *rule.only):
            source.replace_between(source.end(before), source.end(argument), "")
        else:
            last = argument
    names = {keyword.arg for keyword in call.keywords}
    added = ["find_unused_parameters=True"] if _literal(call, "delay_allreduce") else []
    for name, value in rule.added.items():
        if name not in names and not (name == "eps" and len(call.args) > 1):
            added.append(f"{name}={value}")
    if added:
        source.replace_between(source.end(last), source.end(last), "".join(f", {text}" for text in added))


def _literal(call: ast.Call, name: str) -> object:
    for keyword in call.keywords:
        if keyword.arg == name:
            return keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
    return None


def _with(name: str, remark: str) -> str:
    return f"{name}; {remark}" if remark else name
