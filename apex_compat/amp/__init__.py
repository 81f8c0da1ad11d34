"""Has the interface of apex.amp on any device: mixed precision by one call. See apex_compat/README.md."""

from apex_compat.amp._amp_state import _amp_state, master_params
from apex_compat.amp.amp import (
    float_function,
    half_function,
    init,
    promote_function,
    register_float_function,
    register_half_function,
    register_promote_function,
)
from apex_compat.amp.frontend import initialize, load_state_dict, state_dict
from apex_compat.amp.handle import disable_casts, scale_loss

__all__ = [
    "_amp_state",
    "disable_casts",
    "float_function",
    "half_function",
    "init",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "register_float_function",
    "register_half_function",
    "register_promote_function",
    "scale_loss",
    "state_dict",
]
