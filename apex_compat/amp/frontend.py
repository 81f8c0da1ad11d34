"""Holds the opt levels, `initialize`, and the state dict of the loss scales."""

from collections import OrderedDict
from typing import Any

import torch

from apex_compat.amp._amp_state import _amp_state, maybe_print, restored_after_an_error, warn_or_err
from apex_compat.amp._initialize import _initialize
from apex_compat.amp.amp import deactivate


class Properties:
    """The options of an opt level. Each is an attribute, and checked when it is set.

    Attributes:
        options: the options as a dict.
    """

    options: dict[str, Any]

    def __init__(self) -> None:
        self.__dict__["options"] = {
            "enabled": False,
            "opt_level": None,
            "cast_model_type": None,
            "patch_torch_functions": False,
            "keep_batchnorm_fp32": None,
            "master_weights": None,
            "loss_scale": 1.0,
        }

    def _update_options_dict(self, new_options: dict[str, Any]) -> None:
        """Set options without a check.

        Raises:
            ValueError: there is no such option.
        """
        for name, value in new_options.items():
            if name not in self.options:
                raise ValueError(f"Tried to set unexpected option {name}; the options are {', '.join(self.options)}")
            self.options[name] = value

    def __getattr__(self, name: str) -> Any:
        options = self.__dict__.get("options", {})
        if name not in options:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return options[name]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.options:
            check = _CHECKS.get(name)
            self.options[name] = check(value, self.opt_level) if check else value
        else:
            super().__setattr__(name, value)


def _checked_cast_model_type(value: Any, opt_level: str | None) -> Any:
    # bfloat16 is an extension: the half precision that O1 casts to.
    if opt_level == "O1" and value not in (None, False, torch.float32, torch.bfloat16):
        warn_or_err(
            "O1 inserts casts around Torch functions rather than model weights, so with O1, the model weights "
            f"themselves should remain FP32. If you wish to cast the model itself, use O2 or O3. "
            f"cast_model_type was {value}; O1 takes torch.bfloat16 alone, for its casts."
        )
    return value


def _checked_patch_torch_functions(value: Any, opt_level: str | None) -> Any:
    if opt_level != "O1" and value:
        warn_or_err("Currently, patch_torch_functions=True should only be set by selecting opt_level='O1'.")
    return value


def _checked_keep_batchnorm_fp32(value: Any, opt_level: str | None) -> Any:
    if opt_level == "O1" and value is not None:
        warn_or_err(
            "With opt_level O1, batchnorm functions are automatically patched to run in FP32, so "
            f"keep_batchnorm_fp32 should be None. keep_batchnorm_fp32 was {value}"
        )
    parsed = {"True": True, "False": False}.get(value, value) if isinstance(value, str) else value
    if parsed not in (True, False, None):
        raise AssertionError(
            f"keep_batchnorm_fp32 must be a bool, the string 'True' or 'False', or None; found {value!r}"
        )
    return parsed


def _checked_master_weights(value: Any, opt_level: str | None) -> Any:
    if opt_level == "O1" and value is not None:
        warn_or_err("It doesn't make sense to use master_weights with O1: its model weights themselves are FP32.")
    return value


def _checked_loss_scale(value: Any, opt_level: str | None) -> Any:
    return value if value == "dynamic" else float(value)


_CHECKS = {
    "cast_model_type": _checked_cast_model_type,
    "patch_torch_functions": _checked_patch_torch_functions,
    "keep_batchnorm_fp32": _checked_keep_batchnorm_fp32,
    "master_weights": _checked_master_weights,
    "loss_scale": _checked_loss_scale,
}


class OptLevel:
    """A named set of options. Calling it sets them."""

    brief: str
    more: str
    options: dict[str, Any]

    def __call__(self, properties: Properties) -> Properties:
        """Set the options of this level in `properties` and return it."""
        properties._update_options_dict({"enabled": True, "opt_level": type(self).__name__, **self.options})
        return properties


class O0(OptLevel):
    """Everything in fp32: the baseline."""

    brief = "O0:  Pure FP32 training.\n"
    more = "The model and its inputs are cast to FP32. Nothing else changes."
    options = {  # noqa: RUF012  never changed
        "cast_model_type": torch.float32,
        "patch_torch_functions": False,
        "keep_batchnorm_fp32": None,
        "master_weights": False,
        "loss_scale": 1.0,
    }


class O1(OptLevel):
    """Casts around torch's functions; the weights stay in fp32."""

    brief = "O1:  Insert automatic casts around Pytorch functions and Tensor methods.\n"
    more = "The weights stay in FP32. Products run in half precision, what needs its range or digits in FP32."
    options = {  # noqa: RUF012  never changed
        "cast_model_type": None,
        "patch_torch_functions": True,
        "keep_batchnorm_fp32": None,
        "master_weights": None,
        "loss_scale": "dynamic",
    }


class O2(OptLevel):
    """A model in half precision but for batch norm, with fp32 master weights."""

    brief = "O2:  FP16 training with FP32 batchnorm and FP32 master weights.\n"
    more = "The model is cast to half precision, but for batch norms. The optimizer updates FP32 copies of its weights."
    options = {  # noqa: RUF012  never changed
        "cast_model_type": torch.float16,
        "patch_torch_functions": False,
        "keep_batchnorm_fp32": True,
        "master_weights": True,
        "loss_scale": "dynamic",
    }


class O3(OptLevel):
    """Everything in half precision: a bound on speed."""

    brief = "O3:  Pure FP16 training."
    more = "The model is cast to half precision and updated in it. This may not train well."
    options = {  # noqa: RUF012  never changed
        "cast_model_type": torch.float16,
        "patch_torch_functions": False,
        "keep_batchnorm_fp32": False,
        "master_weights": False,
        "loss_scale": 1.0,
    }


opt_levels: dict[str, OptLevel] = {"O3": O3(), "O2": O2(), "O1": O1(), "O0": O0()}


@restored_after_an_error()
def initialize(
    models: Any,
    optimizers: Any = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | None = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: bool | str | None = None,
    master_weights: bool | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float = 2.0**24,
    check_overflow: bool = False,
) -> Any:
    """Prepare models and optimizers for mixed precision, in place.

        model, optimizer = amp.initialize(model, optimizer, opt_level="O1")
        # each step
        with amp.scale_loss(loss, optimizer) as scaled_loss:
            scaled_loss.backward()
        optimizer.step()

    Under O0, O2 and O3 models cast their inputs and outputs, also where a script calls `model.forward`. Forward
    pre-hooks of a model see its inputs uncast, and forward hooks see cast outputs.

    Under O1 the functions of torch.compile run uncompiled, since the casts change from call to call.

    Call it once, with all models and optimizers, and before any DistributedDataParallel. A further call, say for
    another fold of a cross validation, replaces the loss scales and the casts of the one before.

    Args:
        models: a model in fp32, or a list of models.
        optimizers: an optimizer, a list of optimizers, or None.
        enabled: False returns the arguments unchanged, and `scale_loss` gives the loss itself.
        opt_level: "O0": fp32. "O1": fp32 weights, and torch's functions cast their arguments. "O2": weights in half
            precision but for batch norm, with fp32 masters. "O3": all in half precision.
        cast_model_type: O0, O2, O3: the dtype of the model. O1: torch.bfloat16 casts to that instead of float16.
        patch_torch_functions: set by the level.
        keep_batchnorm_fp32: O2, O3: True leaves batch norms in fp32. "True" and "False" are allowed too.
        master_weights: O2, O3: True keeps fp32 masters of half-precision parameters.
        loss_scale: a number, a string with a number, or "dynamic".
        cast_model_outputs: the dtype of what the models return. By default float32, but as it is under O1.
        num_losses: how many loss scales there are. `scale_loss` takes one by its `loss_id`.
        verbosity: 0 prints nothing, 1 the options and each overflow, 2 each cast of O1 too.
        min_loss_scale: bounds dynamic loss scales from below; None means 2**-100.
        max_loss_scale: bounds dynamic loss scales from above; 2**127 does so too.
        check_overflow: False applies inf and nan under a static loss scale, as apex did, and prints it once. True
            skips such steps.

    After an error everything is as it was before the call: models, optimizers, and what an earlier call did.

    Returns:
        Models, or models and optimizers unless those are None. Each is a list if it was given as one.

    Raises:
        RuntimeError: the level is unknown or does not go with another argument, a model is in half precision or in a
            parallel wrapper, or an optimizer was initialized before.
        TypeError: models or optimizers are neither one nor a list.
        ValueError: loss_scale is not a number.
        AssertionError: keep_batchnorm_fp32 is another value.
    """
    properties = _amp_state.opt_properties = Properties()
    _amp_state.verbosity = verbosity
    if not enabled:
        deactivate()
        _amp_state.loss_scalers = []
        return models if optimizers is None else (models, optimizers)
    if opt_level not in opt_levels:
        raise RuntimeError(
            f"Unexpected optimization level {opt_level}. Options are 'O0', 'O1', 'O2', 'O3'. "
            "Note that in `O0`, `O1`, etc., the prefix O is the letter O, not the number zero."
        )
    level = opt_levels[opt_level]
    level(properties)
    maybe_print(f"Selected optimization level {level.brief}", rank0=True)
    maybe_print("Defaults for this optimization level are:", rank0=True)
    _print_options(properties)
    _amp_state.min_loss_scale = min_loss_scale
    _amp_state.max_loss_scale = max_loss_scale
    maybe_print("Processing user overrides (additional kwargs that are not None)...", rank0=True)
    overrides = {
        "cast_model_type": cast_model_type,
        "patch_torch_functions": patch_torch_functions,
        "keep_batchnorm_fp32": keep_batchnorm_fp32,
        "master_weights": master_weights,
        "loss_scale": loss_scale,
    }
    for name, value in overrides.items():
        if value is not None:
            setattr(properties, name, value)
    maybe_print("After processing overrides, optimization options are:", rank0=True)
    _print_options(properties)
    return _initialize(models, optimizers, properties, num_losses, cast_model_outputs, check_overflow)


def _print_options(properties: Properties) -> None:
    for name, value in properties.options.items():
        maybe_print(f"{name:22} : {value}", rank0=True)


def state_dict(destination: Any = None) -> dict[str, Any]:
    """Return the loss scales: a dict for each loss, with keys "loss_scaler0" and so on.

    Each has "loss_scale", a float, and "unskipped", the updates since it moved. The masters of O2 are in the state
    dict of the model.

    Args:
        destination: a dict to fill and return, or None for a new one.
    """
    destination = OrderedDict() if destination is None else destination
    for index, scaler in enumerate(_amp_state.loss_scalers):
        destination[f"loss_scaler{index}"] = {"loss_scale": scaler.loss_scale(), "unskipped": scaler._unskipped}
    return destination  # type: ignore[no-any-return]


def load_state_dict(state_dict: dict[str, Any]) -> None:
    """Restore the loss scales that `state_dict` returned, in their order.

    Raises:
        RuntimeError: a key does not name a loss scale. The others are loaded.
    """
    scalers = _amp_state.loss_scalers
    if len(state_dict) != len(scalers):
        print(f"Warning: state_dict contains {len(state_dict)} entries, while {len(scalers)} loss_scalers are used")
    unexpected = [key for key in state_dict if "loss_scaler" not in key]
    states = [state for key, state in state_dict.items() if "loss_scaler" in key]
    for index, state in enumerate(states):
        if index == len(scalers):
            print(f"Skipping loss_scaler[{index}], since num_losses was set to {len(scalers)}")
            break
        scalers[index]._loss_scale = state["loss_scale"]
        scalers[index]._unskipped = state["unskipped"]
    if unexpected:
        names = ", ".join(f'"{key}"' for key in unexpected)
        raise RuntimeError(f"Error(s) in loading state_dict. Unexpected key(s) in state_dict: {names}. ")
