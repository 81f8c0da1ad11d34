"""Changes models and optimizers as the properties of an opt level say."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from apex_compat.amp._amp_state import _amp_state
from apex_compat.amp._forward import applier as applier  # the name that scripts import from here
from apex_compat.amp._forward import cast_forward, uncast_forward
from apex_compat.amp._process_optimizer import _process_optimizer, fp32_values
from apex_compat.amp.amp import deactivate, install
from apex_compat.amp.handle import AmpHandle, accelerator_or_cpu
from apex_compat.amp.scaler import LossScaler
from apex_compat.fp16_utils import FP16_Optimizer, convert_network
from apex_compat.fp16_utils.checks import HALF_DTYPES
from apex_compat.fp16_utils.masters import followed


def _initialize(
    models: Any,
    optimizers: Any,
    properties: Any,
    num_losses: int = 1,
    cast_model_outputs: torch.dtype | None = None,
    check_overflow: bool = False,
) -> Any:
    """Do what `amp.initialize` does once the `Properties` are settled. It checks everything first."""
    listed_optimizers, listed_models = _optimizers(optimizers), _models(models)
    check_models(listed_models)
    if not _amp_state.allow_incoming_model_not_fp32:
        check_params_fp32(listed_models)
    check_optimizers(listed_optimizers)
    check_cast_model_type(properties)
    scalers = [_new_scaler(properties.loss_scale, check_overflow) for _ in range(num_losses)]
    deactivate()
    for model in listed_models:
        _cast_model(model, properties, cast_model_outputs)
        if properties.master_weights and listed_optimizers:
            for module in model.modules():
                module.register_load_state_dict_pre_hook(_remember_fp32)  # type: ignore[no-untyped-call]
    for optimizer in listed_optimizers:
        if _casts_weights(properties) and not properties.master_weights:
            # Loading casts existing state to the new dtype of its parameter. Masters take state in fp32.
            optimizer.load_state_dict(optimizer.state_dict())
        _process_optimizer(optimizer, properties.master_weights)
    _amp_state.loss_scalers = scalers
    if properties.patch_torch_functions:
        half = properties.cast_model_type if properties.cast_model_type in HALF_DTYPES else torch.float16
        verbose = _amp_state.verbosity == 2
        handle = AmpHandle(properties.loss_scale, True, verbose, half, _device_types(listed_models))
        _amp_state.handle = handle
        install(handle)
    result_models = listed_models if isinstance(models, list) else listed_models[0]
    if optimizers is None:
        return result_models
    return result_models, listed_optimizers if isinstance(optimizers, list) else listed_optimizers[0]


def _models(models: Any) -> list[nn.Module]:
    if isinstance(models, nn.Module):
        return [models]
    if isinstance(models, list):
        return models
    raise TypeError("models must be either a single model or a list of models.")


def _optimizers(optimizers: Any) -> list[Any]:
    if optimizers is None:
        return []
    if isinstance(optimizers, list):
        return optimizers
    # LARC is no torch optimizer, but has its groups and methods.
    if isinstance(optimizers, Optimizer) or (hasattr(optimizers, "param_groups") and hasattr(optimizers, "step")):
        return [optimizers]
    raise TypeError("optimizers must be either a single optimizer or a list of optimizers.")


def check_models(models: list[nn.Module]) -> None:
    """Raise RuntimeError if one of `models` is in a parallel wrapper of torch or apex.

    A wrapper reads the dtypes of the parameters, which `initialize` is about to change.
    """
    for model in models:
        for kind in type(model).__mro__:
            if kind.__name__ in ("DataParallel", "DistributedDataParallel"):
                raise RuntimeError(
                    f"Incoming model is an instance of {kind.__module__}.{kind.__name__}. "
                    "Parallel wrappers should only be applied AFTER amp.initialize: wrap the model that it returns."
                )


def check_params_fp32(models: list[nn.Module]) -> None:
    """Raise RuntimeError if a parameter or buffer of `models` is float16."""
    for model in models:
        for what, tensors in (("param", model.named_parameters()), ("buffer", model.named_buffers())):
            for name, tensor in tensors:
                if tensor.dtype == torch.float16:
                    raise RuntimeError(
                        f"Found {what} {name} with type {tensor.dtype}, expected torch.float32. "
                        "When using amp.initialize, you do not need to call .half() on your model."
                    )


def check_optimizers(optimizers: list[Any]) -> None:
    """Raise RuntimeError if one of `optimizers` keeps masters itself, or comes a second time."""
    for i, optimizer in enumerate(optimizers):
        if hasattr(optimizer, "_amp_stash") or any(optimizer is other for other in optimizers[:i]):
            raise RuntimeError("A given optimizer should only be passed through amp.initialize once.")
        if isinstance(optimizer, FP16_Optimizer):
            raise RuntimeError(  # noqa: TRY004  apex's
                "An incoming optimizer is a fp16_utils.FP16_Optimizer, which keeps masters and a loss scale itself. "
                "Pass the optimizer that it wraps to amp.initialize."
            )


def check_cast_model_type(properties: Any) -> None:
    """Raise TypeError if a model cannot have the dtype that `properties` ask for."""
    dtype = properties.cast_model_type
    if dtype and not (isinstance(dtype, torch.dtype) and (dtype.is_floating_point or dtype.is_complex)):
        raise TypeError(f"cast_model_type is {dtype!r}; it must be a floating point dtype such as torch.float16")


def _casts_weights(properties: Any) -> bool:
    # O1 has cast_model_type=torch.bfloat16 for the dtype of its half precision.
    return bool(properties.cast_model_type) and not properties.patch_torch_functions


def _new_scaler(loss_scale: float | str, check_overflow: bool) -> LossScaler:
    scaler = LossScaler(loss_scale, min_loss_scale=_amp_state.min_loss_scale, max_loss_scale=_amp_state.max_loss_scale)
    scaler.check_overflow = check_overflow
    return scaler


def _device_types(models: list[nn.Module]) -> frozenset[str]:
    """Return the types of the devices that hold `models`. Side models elsewhere are no business of O1.

    Models on the CPU may move to the accelerator later, and without models nobody knows.
    """
    types = frozenset(t.device.type for model in models for t in (*model.parameters(), *model.buffers()))
    return types if types - {"cpu"} else types | accelerator_or_cpu()


def _cast_model(model: nn.Module, properties: Any, outputs: torch.dtype | None) -> None:
    """Cast the weights of `model`, and let it cast what goes in and out and what is saved."""
    for module in model.modules():
        uncast_forward(module)
    if not _casts_weights(properties):
        if outputs:
            cast_forward(model, None, outputs)
        return
    dtype = properties.cast_model_type
    if properties.keep_batchnorm_fp32:
        convert_network(model, dtype)
    else:
        model.to(dtype)
    cast_forward(model, dtype, outputs or torch.float32)
    for module in model.modules() if dtype in HALF_DTYPES else ():
        module.register_state_dict_post_hook(_save_fp32)  # type: ignore[no-untyped-call]


def _half_tensors(module: nn.Module, prefix: str) -> list[tuple[str, Tensor]]:
    """Return the half-precision parameters and buffers of `module` itself, with their keys in a state dict."""
    own = (*module._parameters.items(), *module._buffers.items())
    return [(prefix + name, t) for name, t in own if t is not None and t.dtype in HALF_DTYPES]


@torch.no_grad()
def _save_fp32(module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Put fp32 values for half-precision ones: those of the masters, where there are masters.

    They round to the weights in the model. From a checkpoint with them training goes on as if undisturbed.
    """
    for key, half in _half_tensors(module, prefix):
        if key in state_dict:
            master = fp32_values.get(half)
            state_dict[key] = half.float() if master is None else followed(master, half)


@torch.no_grad()
def _remember_fp32(module: nn.Module, state_dict: dict[str, Any], prefix: str, *ignored: Any) -> None:
    """Give the masters what is loaded into their half-precision parameters, or keep it for masters to come.

    It is not kept for frozen parameters: no step has given their masters digits that half precision lacks.
    """
    for key, half in _half_tensors(module, prefix):
        loaded = state_dict.get(key)
        if not isinstance(half, nn.Parameter) or not isinstance(loaded, Tensor) or loaded.shape != half.shape:
            continue
        if half in fp32_values:
            fp32_values[half].copy_(loaded)
        elif half.requires_grad:
            fp32_values[half] = loaded.detach().to(half.device, torch.float32, copy=True)
