"""Has the interface of apex.fp16_utils on any device: master weights and loss scaling. See apex_compat/README.md.

Beside apex's names it exports the bounds of every loss scale, and `fused` for steps that skip on the device.
"""

from apex_compat.fp16_utils import fused
from apex_compat.fp16_utils.checks import LARGEST_SCALE, SMALLEST_SCALE
from apex_compat.fp16_utils.fp16_optimizer import FP16_Optimizer
from apex_compat.fp16_utils.fp16util import (
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
from apex_compat.fp16_utils.loss_scaler import DynamicLossScaler, LossScaler

__all__ = [
    "LARGEST_SCALE",
    "SMALLEST_SCALE",
    "BN_convert_float",
    "DynamicLossScaler",
    "FP16Model",
    "FP16_Optimizer",
    "LossScaler",
    "clip_grad_norm",
    "convert_module",
    "convert_network",
    "fused",
    "master_params_to_model_params",
    "model_grads_to_master_grads",
    "network_to_half",
    "prep_param_lists",
    "to_python_float",
    "tofp16",
]
