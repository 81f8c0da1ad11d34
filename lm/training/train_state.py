"""The train state: all that a run is between two steps, as values and tensors, taken and put back to the bit."""

from dataclasses import asdict
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lm.model.language_model import Hidden, RNNModel
from lm.training import distributed
from lm.training.checkpoint import Position, check_like
from roundoff import processes
from roundoff.device import get_random_state, set_random_state
from roundoff.errors import printable
from roundoff.precision import Precision


class TrainState(NamedTuple):
    """Holds what a run has between two steps, beside its model, its precision and its random generators.

    Attributes:
        position: how far the run is.
        hidden: before the next batch; None at the first batch of an epoch.
        best_weights: on the CPU, those with the lowest validation loss; None before the first validation.
    """

    position: Position
    hidden: Hidden | None = None
    best_weights: dict[str, Tensor] | None = None


def take_state(
    model: RNNModel,
    precision: Precision,
    position: Position,
    hidden: Hidden | None,
    best_weights: dict[str, Tensor] | None,
) -> dict[str, Any]:
    """Return the state of a run, on rank 0 that of all processes; they must all ask. Tensors are not copied.

    hidden        before the next batch, whose shape is (nlayers, columns of this process, nhid); None at the first,
                  an empty list for a model that has none
    best_weights  on the CPU, those with the lowest validation loss; None before the first validation
    """
    parts = distributed.gather((_tuple(hidden), _random_states(model)))
    columns = [part for part, _ in parts if part is not None]
    return {
        "model": model.state_dict(),
        "precision": precision.state_dict(),
        "position": asdict(position),
        "hidden": [torch.cat(tensors, dim=1) for tensors in zip(*columns, strict=True)] if columns else None,
        "random": [random for _, random in parts],
        "best_weights": best_weights,
    }


def restore_state(state: dict[str, Any], model: RNNModel, precision: Precision, batch_size: int) -> TrainState:
    """Put `state` back into `model`, `precision` and the random generators; return the rest of it.

    With another number of processes than it was taken in, each takes its columns of the hidden state, and the
    generators of those that were not there before stay as a new run has them.

    Raises:
        ValueError: `state` is not the state of such a run; what was put back until then stays.
    """
    try:
        with precision.forward():
            fresh = model.init_hidden(batch_size)
        expected_hidden = list(_tuple(fresh) or ())  # outside: O1 of apex casts what goes to the CPU
        weights = model.state_dict()
        check_like(state["model"], weights, "model")
        check_like(state["precision"], precision.state_dict(), "precision")
        for name in {"optimizer", "optimizer_state_dict"} & state["precision"].keys():
            _check_optimizer_state(state["precision"][name], precision.param_groups)
        position = Position.restore(state["position"])
        if state["hidden"] is not None:
            check_like(state["hidden"], expected_hidden, "hidden")
        if state["best_weights"] is not None:
            check_like(state["best_weights"], weights, "best_weights")
        if not isinstance(state["random"], list):
            raise TypeError("random is no list")
        for random in state["random"][processes.rank() :][:1]:
            check_like(random, _random_states(model), "random")
        model.load_state_dict(state["model"])
        precision.load_state_dict(state["precision"])
        mine = _random_states(model)
        for rank, states in enumerate(state["random"]):
            _set_random_states(states, model)  # those of all, so that all find a mistake, or none
            mine = states if rank == processes.rank() else mine
        _set_random_states(mine, model)
        return TrainState(position, _my_hidden(state["hidden"], model), state["best_weights"])
    except Exception as error:  # the content of a hostile checkpoint can make any of these fail in any way
        reason = printable(" ".join(str(error).split()), 160)
        raise ValueError(f"its checkpoint is not of this run ({reason})") from None


def _tuple(hidden: Hidden | None) -> tuple[Tensor, ...] | None:
    if hidden is None:
        return None
    return tuple(h.detach().cpu() for h in (hidden if isinstance(hidden, tuple) else (hidden,)))


def _my_hidden(saved: list[Tensor] | None, model: RNNModel) -> Hidden | None:
    if saved is None:
        return None
    mine = [h.chunk(processes.world_size(), dim=1)[processes.rank()] for h in saved]
    device = model.decoder.weight.device
    tensors = tuple(h.contiguous().to(device) for h in mine)
    return tensors[0] if len(tensors) == 1 else tensors


def _random_states(model: RNNModel) -> dict[str, Tensor]:
    """Return the generators' states: dropout draws on the model's device, sampling and start-up on the CPU."""
    device = model.decoder.weight.device
    states = {"cpu": torch.get_rng_state()}
    of_device = get_random_state(device)
    return states if of_device is None else states | {device.type: of_device}


def _set_random_states(states: dict[str, Tensor], model: RNNModel) -> None:
    torch.set_rng_state(states["cpu"])
    device = model.decoder.weight.device
    if device.type in states and device.type != "cpu":
        set_random_state(states[device.type], device)


def _check_optimizer_state(saved: Any, groups: list[dict[str, Any]]) -> None:
    """Raise ValueError unless `saved` is the state of an optimizer with `groups`; load_state_dict takes any.

    A fused kernel trusts the shapes, and follows each group's switches to buffers that may not be there.
    """
    for group, theirs in zip(groups, saved["param_groups"], strict=True):
        for name, value in group.items():
            if name not in ("params", "lr") and theirs[name] != value:
                raise ValueError(f"the optimizer's {name} is {str(theirs[name])[:20]}")
    params = [p for group in groups for p in group["params"]]
    names = {"step", "exp_avg", "exp_avg_sq"} if "betas" in groups[0] else {"momentum_buffer"}
    for index, buffers in saved["state"].items():
        if buffers and buffers.keys() != names:
            raise ValueError(f"the optimizer's buffers are {', '.join(map(str, buffers))}")
        for name, buffer in buffers.items():
            if name == "momentum_buffer" and buffer is None:
                continue
            shape = torch.Size() if name == "step" else params[index].shape
            if not isinstance(buffer, Tensor) or buffer.shape != shape or not buffer.is_floating_point():
                raise ValueError(f"the optimizer's {name} has the wrong shape or type")
