"""Mixed-precision training helpers with the interface of apex.fp16_utils. See README.md in this folder."""

from fp16_utils.apex_checkpoint import load_apex_checkpoint
from fp16_utils.fp16_optimizer import FP16_Optimizer
from fp16_utils.fp16util import (
    BN_convert_float,
    FP16Model,
    clip_grad_norm,
    convert_module,
    convert_network,
    master_params_to_model_params,
    model_grads_to_master_grads,
    network_to_half,
    prep_param_lists,
    to_python_float,
    tofp16,
)
from fp16_utils.loss_scaler import DynamicLossScaler, LossScaler
from fp16_utils.provide import provide_apex

__all__ = [
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "load_apex_checkpoint",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "provide_apex",
    "to_python_float",
    "tofp16",
]
