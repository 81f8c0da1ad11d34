"""Makes a wrapper around a torch optimizer a torch optimizer itself."""

from typing import Any, NoReturn

from torch.optim import Optimizer


class OptimizerWrapper(Optimizer):
    """An optimizer whose groups, state and defaults are those of the one it wraps.

    Schedulers accept it. Step and state-dict hooks can be registered with it. Hooks of the wrapped optimizer
    fire when the wrapped optimizer is called. A subclass defines `_get_state` and `_set_state`.

    Args:
        optimizer: the optimizer to wrap.

    Attributes:
        optimizer: the wrapped optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer
        # The base class's __init__ would make groups and state of its own. This makes its hook registries
        # only.
        self.__setstate__({})

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return the wrapped optimizer's groups, themselves and not copies."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, value: list[dict[str, Any]]) -> None:
        self.optimizer.param_groups = value

    @property
    def state(self) -> Any:
        """Return the wrapped optimizer's state by parameter."""
        return self.optimizer.state

    @state.setter
    def state(self, value: Any) -> None:
        self.optimizer.state = value

    @property
    def defaults(self) -> dict[str, Any]:  # type: ignore[override]
        """Return the wrapped optimizer's defaults for new groups."""
        return self.optimizer.defaults

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a bit-exact resume needs, in tensors and plain values.

        State-dict hooks run before and after; the last ones may change or replace the dict.
        """
        for before in self._optimizer_state_dict_pre_hooks.values():
            before(self)
        state = self._get_state()
        for after in self._optimizer_state_dict_post_hooks.values():
            changed = after(self, state)
            state = state if changed is None else changed
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned. Load hooks run before and after.

        Raises:
            TypeError, ValueError: a key is missing or unknown, or groups or shapes differ. Nothing has
                changed then.
        """
        for before in self._optimizer_load_state_dict_pre_hooks.values():
            changed = before(self, state_dict)
            state_dict = state_dict if changed is None else changed
        self._set_state(state_dict)
        for after in self._optimizer_load_state_dict_post_hooks.values():
            after(self)

    def _get_state(self) -> dict[str, Any]:
        raise NotImplementedError

    def _set_state(self, state: dict[str, Any]) -> None:
        raise NotImplementedError

    def __getstate__(self) -> NoReturn:
        raise RuntimeError(f"{type(self).__name__} cannot be pickled or copied; save and load its state_dict()")
