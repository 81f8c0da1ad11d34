"""The reference and the modes of a probe of any `nn.Module`, by a loss that is the user's."""

import copy
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from apex_compat.amp.utils import half_of_casts
from roundoff.device import get_random_states, set_random_states
from roundoff.errors import UsageError, printable
from roundoff.gradients.casts import SameDraws, Wide, cast, each_tensor
from roundoff.gradients.measure import ParameterGradients, ScaledGradients
from roundoff.gradients.tally import drop_negligible
from roundoff.modes import Build, floating
from roundoff.precision import Precision

Loss = Callable[..., Any]
"""`loss(model, batch)` returns a scalar, or named outputs of which "loss" is the scalar."""

LOSS = "loss"
FAILURES = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
"""What a model or a loss may raise where a dtype does not suit it, or the batch."""

MOST_HALVINGS = 100
"""Of a dynamic loss scale: from 2**16 to 2**-84."""

ROUNDING = {torch.float64: 2.0**-40, torch.float32: 2.0**-18}
"""Dtype of the reference -> the share of all gradients' largest element up to which a tensor is rounding alone."""


@dataclass(frozen=True)
class Batch:
    """Holds what the loss takes: the user's batch, and the state that the reference has left, if the loss has one."""

    content: Any
    state: tuple[Any, ...] = ()


@dataclass(frozen=True)
class Task:
    """Says what is probed: a model, and what computes its loss.

    Attributes:
        model: stays as it is; each pass has a copy.
        loss: called with the copy, a batch, and the state if there is one. With a state it returns a pair: what it
            returns else, and the state after the batch.
        watched: names of submodules of whose outputs the gradients are measured too.
        stateful: whether the loss has a state.
    """

    model: nn.Module
    loss: Loss
    watched: Sequence[str] = field(default=())
    stateful: bool = False

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return name -> parameter that requires grad, each once."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad and p.numel()}


def check_task(task: Task) -> None:
    """Raise UsageError unless there is something to probe."""
    lazy = [name for name, p in task.model.named_parameters() if is_lazy(p)]
    if lazy:
        raise UsageError(f"parameter {printable(lazy[0])} has no shape yet; let the model see one batch first")
    if not task.parameters():
        raise UsageError("the model has no parameter that requires grad; there is no gradient to probe")
    for name, p in task.parameters().items():
        if p.dtype is not torch.float32:
            raise UsageError(
                f"parameter {printable(name)} is {p.dtype}; a probe starts from fp32 weights: give model.float()"
            )
    for name in task.watched:
        try:
            found = bool(name) and isinstance(task.model.get_submodule(name), nn.Module)
        except AttributeError:
            found = False
        if not found:
            some = ", ".join([name for name, _ in task.model.named_modules() if name][:8])
            raise UsageError(f"watch={printable(name)!r}: the model has no such submodule; it has {printable(some)}")


def copied(model: nn.Module, *, sharing: bool = False) -> nn.Module:
    """Return a copy of `model` without gradients; `sharing`: with the same weights, as long as nobody writes to them.

    Raises:
        UsageError: it cannot be copied.
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(p.detach() if sharing else p.detach().clone(), p.requires_grad)
        vars(memo[id(p)]).update(vars(p))  # by which a build may tell parameters apart
    try:
        return copy.deepcopy(model, memo)
    except (RuntimeError, TypeError) as error:
        where = _with_a_history(model)
        raise UsageError(
            f"the model cannot be copied, which a probe does for each mode: {where or _first_line(error)}"
        ) from None


def _with_a_history(model: nn.Module) -> str:
    """Say which attribute of which submodule is a tensor that was computed; "" if none is."""
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                place = f"{name}.{attribute}".lstrip(".")
                instead = "delete it, or use torch.nn.utils.parametrizations where it is a weight"
                return f"{printable(place)} is computed by a forward pass; {instead}"
    return ""


class ModuleReference:
    """Computes the true gradient of any module: a copy of it in `dtype`, float64 unless it lacks kernels for that.

    Args:
        task: what is probed.
        dtype: float64 or float32.
        state: of the loss before the first batch.
    """

    def __init__(self, task: Task, dtype: torch.dtype = torch.float64, state: Any = None) -> None:
        self._task, self._dtype = task, dtype
        self._start = copied(task.model)
        self._start.double() if dtype is torch.float64 else self._start.float()
        self._model, self._watch = self._start, _Watch(self._start, ())
        self._state = (cast(state, dtype),) if task.stateful else ()
        self.weights = {name: _flat(p.detach().float().cpu()) for name, p in task.parameters().items()}
        self.reached: set[str] = set()  # parameters with a gradient in some batch
        self.outputs: dict[str, Tensor] = {}

    @property
    def kinds(self) -> Mapping[str, str]:
        """See `Reference.kinds`: an output comes after the last parameter of its submodule."""
        names = list(self.weights)
        for watched in self._task.watched:
            inside = [i for i, name in enumerate(names) if name.startswith(f"{watched}.")]
            names.insert(inside[-1] + 1 if inside else len(names), f"{watched} (output)")
        return {name: "parameter" if name in self.weights else "boundary" for name in names}

    @property
    def boundaries(self) -> Mapping[str, Tensor]:
        """See `Reference.boundaries`."""
        return {f"{name} (output)": gradient for name, gradient in self._watch.gradients().items()}

    def batches(self, contents: Iterable[Any]) -> Iterator[Batch]:
        """Yield `contents` as batches; each carries the state that the reference has left."""
        for content in contents:
            yield Batch(content, self._state)

    def run(self, batch: Batch, see: Callable[[str, Tensor], None]) -> None:
        """See `Reference.run`.

        Raises:
            UsageError: the loss is no finite scalar, no gradient comes of it, or torch cannot do this in the dtype.
        """
        self._model = copied(self._start, sharing=True)  # with buffers of its own, and all else that may change
        versions = [p._version for p in self._start.parameters()]
        self._watch = _Watch(self._model, self._task.watched)
        with self._cannot_run(batch), torch.enable_grad(), Wide(self._dtype):
            returned = self._task.loss(self._model, cast(batch.content, self._dtype), *batch.state)
            if self._task.stateful:
                returned, state = _pair(returned)
                self._state = (each_tensor(state, Tensor.detach),)
            value, self.outputs = read_outputs(returned)
            if not bool(value.isfinite()):
                raise UsageError(f"the loss is {value.item()} in {_short(self._dtype)}; give batches of finite loss")
            if not value.requires_grad:
                raise UsageError("the loss does not depend on the model's parameters; there is no gradient to probe")
            value.backward()  # type: ignore[no-untyped-call]
        if versions != [p._version for p in self._start.parameters()]:  # a forward pass has written to the weights
            with torch.no_grad():
                for p, given in zip(self._start.parameters(), self._task.model.parameters(), strict=True):
                    p.copy_(given)
        self._drop_rounding()
        for name, gradient in self._watch.gradients().items():
            if not bool(gradient.isfinite().all()):
                raise UsageError(f"the gradient of the output of {printable(name)} is not finite in the reference")

    def _drop_rounding(self) -> None:
        """Set to 0 what is rounding alone, such as the gradient of a bias that a BatchNorm takes out again.

        Raises:
            UsageError: a gradient is not finite.
        """
        for _, p in self._named():
            if p.grad is not None and p.grad.layout is not torch.strided:
                p.grad = p.grad.to_dense()
        found = {name: p.grad for name, p in self._named() if p.grad is not None}
        largest = {name: float(torch.linalg.vector_norm(gradient, math.inf)) for name, gradient in found.items()}
        for name, gradient in found.items():
            if not largest[name] < math.inf:
                raise UsageError(
                    f"the gradient of {printable(name)} is not finite in {_short(self._dtype)}, the reference; "
                    "give batches and weights with which the model trains"
                )
            if largest[name] <= ROUNDING[self._dtype] * max(largest.values()):
                gradient.zero_()
                continue
            self.reached.add(name)
            if self._dtype is torch.float64:
                drop_negligible(gradient)

    def gradients(self) -> ParameterGradients:
        """See `Reference.gradients`; a parameter that the loss of this batch has not used has the gradient 0."""
        return {name: (_gradient(p).double(), None) for name, p in self._named()}

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self._model.named_parameters() if name in self.weights)

    @contextmanager
    def _cannot_run(self, batch: Batch) -> Iterator[None]:
        """Say in one line why the loss fails: in this dtype alone, or for the model and the batch as they are, too."""
        try:
            yield
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            dtype, reason = _short(self._dtype), _first_line(error)
            try:
                self._task.loss(copied(self._task.model), *cast((batch.content, *batch.state), torch.float32))
            except FAILURES as plain:
                raise UsageError(f"loss(model, batch) fails for the model as it is: {_first_line(plain)}") from plain
            kernels = "; where a kernel is missing, give reference=torch.float32"
            raise UsageError(
                f"the loss cannot be computed in {dtype}, the reference ({reason}); let it use the model that it is "
                f"given, and cast tensors of its own with .to(){kernels if self._dtype is torch.float64 else ''}"
            ) from error


class ModuleMode:
    """Computes the gradients of any module as training by `build` would.

    A dynamic loss scale backs off where a gradient overflows, as in training, and the batch is taken again.

    Args:
        name: of the mode.
        build: makes the precision management.
        task: what is probed.

    Attributes:
        scale: the loss scale of the last batch.
    """

    def __init__(self, name: str, build: Build, task: Task) -> None:
        self.name, self._build, self._task = name, build, task
        self._device = str(next(task.model.parameters()).device)
        self.description = str(getattr(build, "__doc__", None) or name).splitlines()[0]
        model = copied(task.model)
        try:
            precision = build(model)
        except FAILURES as error:
            raise UsageError(f"mode {printable(name)} cannot be built ({_first_line(error)})") from error
        if not hasattr(precision, "backward"):
            raise UsageError(f"mode {printable(name)}: its build returned {precision!r}; it must return a Precision")
        self._weights = floating(model.parameters())
        with precision.forward():
            self.dtype = _compute_dtype(model, self._weights)
        self._halvings = 0
        self.scale = _loss_scale(precision, model)
        _skip_a_step(precision, model)
        self._is_dynamic = _loss_scale(precision, model) < self.scale

    def dtypes(self) -> Mapping[str, str]:
        """See `Mode.dtypes`: gradients have the dtype of their weights."""
        return dict.fromkeys(("weights", "gradients"), _short(self._weights))

    def gradients(self, batch: Batch) -> ScaledGradients:
        """See `Mode.gradients`.

        Raises:
            UsageError: this machine cannot run the mode.
        """
        before = get_random_states(self._device)
        found = self._run(batch)
        while self._is_dynamic and self._halvings < MOST_HALVINGS and not _finite(found.parameters):
            self._halvings += 1
            set_random_states(before, self._device)
            found = self._run(batch)
        return found

    def _run(self, batch: Batch) -> ScaledGradients:
        model = copied(self._task.model)
        precision = self._build(model)
        for _ in range(self._halvings):
            _loss_scale(precision, model)  # GradScaler makes its scale at the first backward pass
            _skip_a_step(precision, model)
        self.scale = _loss_scale(precision, model)
        watch = _Watch(model, self._task.watched)
        try:
            with torch.enable_grad(), SameDraws():
                with precision.forward():
                    returned = self._task.loss(model, *cast((batch.content, *batch.state), self._weights))
                    value, outputs = read_outputs(_pair(returned)[0] if self._task.stateful else returned)
                precision.backward(value)
        except FAILURES as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise UsageError(f"mode {printable(self.name)} cannot run here ({_first_line(error)})") from error
        found = {name: _gradient(p) for name, p in model.named_parameters() if p.requires_grad and p.numel()}
        boundaries = {f"{name} (output)": gradient for name, gradient in watch.gradients().items()}
        return ScaledGradients(found, boundaries, outputs)


class _Watch:
    """Keeps the gradients of the outputs of some submodules, each as one vector."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        self._found: dict[str, list[Tensor]] = {name: [] for name in names}
        for name in names:
            model.get_submodule(name).register_forward_hook(self._hook(name))

    def _hook(self, name: str) -> Any:
        def keep(module: nn.Module, args: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple | list) else output
            if not isinstance(first, Tensor):
                kind = type(first).__name__
                raise UsageError(
                    f"the output of {printable(name)} is a {kind}; watch a submodule that returns a tensor"
                )
            place = len(self._found[name])
            self._found[name].append(torch.zeros_like(first).detach())
            if first.requires_grad:
                first.register_hook(lambda gradient: self._put(name, place, gradient))  # type: ignore[no-untyped-call]

        return keep

    def _put(self, name: str, place: int, gradient: Tensor) -> None:
        self._found[name][place] = gradient.detach()

    def gradients(self) -> dict[str, Tensor]:
        """Return name -> gradient, of all calls of the submodule."""
        return {name: torch.cat([_flat(g).cpu() for g in kept]) for name, kept in self._found.items()}


def read_outputs(returned: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss, shape (), and all named outputs (float64 vectors on the CPU) of what the user's loss returned.

    Raises:
        UsageError: that is no scalar tensor, and no mapping with a scalar tensor "loss".
    """
    outputs = dict(returned) if isinstance(returned, Mapping) else {LOSS: returned}
    if LOSS not in outputs:
        raise UsageError(f"loss(model, batch) gave a dict without {LOSS!r}; that entry is what is differentiated")
    value = outputs[LOSS]
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        what = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
        raise UsageError(
            f"loss(model, batch) gave {what} as the loss; it must be a floating point tensor of one element"
        )
    kept = {
        name: x.detach().double().flatten().cpu()
        for name, x in outputs.items()
        if isinstance(x, Tensor) and not x.is_complex() and x.numel()
    }
    return value.reshape(()), kept


def _pair(returned: Any) -> tuple[Any, Any]:
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise UsageError("with state=, loss(model, batch, state) must return a pair: the loss, and the state after it")
    return returned


def _loss_scale(precision: Precision, model: nn.Module) -> float:
    """Return the loss scale, which is the gradient of the identity."""
    one = torch.ones((), device=next(model.parameters()).device, requires_grad=True)
    precision.backward(one * 1.0)
    assert one.grad is not None  # noqa: S101
    return float(one.grad)


def _skip_a_step(precision: Precision, model: nn.Module) -> None:
    """Let the loss scale see an overflow; weights stay as they are."""
    for p in model.parameters():
        p.grad = torch.full_like(p, math.inf) if p.requires_grad else None
    precision.step(math.inf)
    model.zero_grad()


def _finite(gradients: Mapping[str, Tensor]) -> bool:
    return all(bool(gradient.isfinite().all()) for gradient in gradients.values())


def _compute_dtype(model: nn.Module, weights: torch.dtype) -> torch.dtype:
    device = next(model.parameters()).device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return half_of_casts(device) or weights


def _gradient(p: nn.Parameter) -> Tensor:
    if p.grad is None:
        return torch.zeros(p.numel(), dtype=p.dtype)
    gradient = p.grad.to_dense() if p.grad.layout is not torch.strided else p.grad
    return _flat(gradient).cpu()


def _flat(tensor: Tensor) -> Tensor:
    """Return `tensor` as a vector: so its sketch is balanced, whatever its shape."""
    return tensor.reshape(-1)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _first_line(error: Exception) -> str:
    return printable((str(error).splitlines() or [type(error).__name__])[0], 160)
