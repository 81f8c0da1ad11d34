"""Makes `import apex` give this package's modules where there is no apex, or where the installed one lacks them.

Every process of an environment may import this module at its start. It imports next to nothing itself, not even typing.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec

from apex_compat.not_offered import INSTEAD, refuse, why_not

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from types import CodeType, ModuleType, TracebackType
    from typing import Any

PACKAGES = (
    "RNN",
    "amp",
    "fp16_utils",
    "fused_dense",
    "mlp",
    "multi_tensor_apply",
    "normalization",
    "optimizers",
    "parallel",
)
"""Lists what this package has of apex, under the same names."""
EXTENSIONS = ("amp_C", "apex_C")
"""Lists what it has of apex's compiled modules, which scripts import beside apex."""


class ProvidedApex:
    """Provides this package's modules as apex's, from its construction until `restore` or the end of `with`."""

    def __init__(self) -> None:
        self._modules_before = {name: sys.modules[name] for name in _apex_modules()}
        self._apex = sys.modules.get("apex")
        self._attributes_before = dict(vars(self._apex)) if self._apex else {}
        self._finder = ApexFinder()
        sys.meta_path.insert(0, self._finder)
        if self._apex:
            _complete(self._apex)

    def restore(self) -> None:
        """Leave imports of apex as they were found. A second call does nothing."""
        if self._finder not in sys.meta_path:
            return
        sys.meta_path.remove(self._finder)
        for name in _apex_modules():
            del sys.modules[name]
        sys.modules.update(self._modules_before)
        if self._apex:
            vars(self._apex).clear()
            vars(self._apex).update(self._attributes_before)

    def __enter__(self) -> ProvidedApex:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def provide_apex() -> ProvidedApex:
    """Make `import apex` give what `apex_compat` has, from now on or within a `with` statement.

        apex_compat.provide_apex()
        from apex import amp

        with apex_compat.provide_apex():
            import old_training_code

    `apex.amp` is then `apex_compat.amp` itself, and so on for every module. Each is imported when it is asked for.
    An installed apex keeps all that it has, and gets what it lacks. If it cannot be imported, this package stands in
    for it, and a warning says so. Modules that neither has raise ModuleNotFoundError with a line that says what to use.

    Returns:
        An object whose `restore()` undoes it. The end of `with` calls `restore()` too.
    """
    return ProvidedApex()


def module_for(name: str) -> str | None:
    """Return the module of this package that is apex's `name`, "apex.amp" or "amp_C"; None if it has none."""
    top, _, rest = name.partition(".")
    if name in EXTENSIONS:
        return f"apex_compat.{name}"
    return f"apex_compat.{rest}" if top == "apex" and rest.partition(".")[0] in PACKAGES else None


def find_installed(name: str, path: Sequence[str] | None = None) -> ModuleSpec | None:
    """Return where a module would come from if this package provided nothing, or None.

    A folder without `__init__.py` is no module where this package has one: uninstalling leaves such folders behind,
    and a clone of apex is one.

    Args:
        name: the module, "apex" or "apex.amp".
        path: the search path of its package; None for a module without a package.
    """
    for finder in sys.meta_path:
        spec = None if isinstance(finder, ApexFinder) else finder.find_spec(name, path)
        if spec and (spec.loader or not (name == "apex" or module_for(name))):
            return spec
    return None


class ApexFinder:
    """Finds apex and its modules, as Python's import asks for them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return how to import `fullname`, or None if it does not concern apex."""
        if fullname.partition(".")[0] not in ("apex", *EXTENSIONS):
            return None
        parent = sys.modules.get(fullname.rpartition(".")[0])
        # In a package of this project others would find its files, and load them a second time under apex's name.
        spec = None if parent and parent.__name__.startswith("apex_compat.") else find_installed(fullname, path)
        if fullname == "apex":
            spec = spec or ModuleSpec("apex", None, is_package=True)
            loader: Any = _ApexLoader(spec.loader)
            spec.loader = loader
            return spec
        ours = module_for(fullname)
        if spec or ours is None:
            return spec or _not_offered(fullname)
        real = importlib.import_module("importlib.util").find_spec(ours)
        if real is None:
            return None
        is_package = real.submodule_search_locations is not None
        loader = _AliasLoader(ours)
        return ModuleSpec(fullname, loader, origin=real.origin, is_package=is_package)


def _not_offered(name: str) -> ModuleSpec | None:
    """Raise the line that says what to use instead; return an empty package where each module has its own line."""
    if any(other.startswith(f"{name}.".removeprefix("apex.")) for other in INSTEAD):
        return ModuleSpec(name, None, is_package=True)
    if sys._getframe(3).f_globals.get("__name__") != "importlib.util":  # its find_spec asks, and imports nothing
        refuse(name)
    return None


class _AliasLoader:
    """Loads a module of this package under apex's name: the same object, not a second copy with classes of its own."""

    def __init__(self, ours: str) -> None:
        self._ours = ours

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self._ours)
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self._spec  # import has put that of the alias in its place
        # Import binds a submodule to its name in the package when it loads it. `amp._amp_state` and `parallel.LARC` are
        # no modules but shall keep their names: their modules, loaded already, must not be loaded again.
        for child, value in list(vars(module).items()):
            loaded = sys.modules.get(f"{self._ours}.{child}")
            if loaded and loaded is not value:
                sys.modules[f"{self._ours}.{child}".replace("apex_compat", "apex", 1)] = loaded

    def get_code(self, fullname: str) -> CodeType | None:
        """Return the code for `python -m apex.parallel.multiproc`."""
        loader = importlib.import_module("importlib.util").find_spec(self._ours).loader
        return loader.get_code(self._ours)  # type: ignore[no-any-return]


class _ApexLoader:
    """Loads the installed apex, if there is one that can be imported, and completes it."""

    def __init__(self, installed: Any) -> None:
        self._installed = installed

    def __getattr__(self, name: str) -> Any:  # whoever asks a spec for a file of apex asks its own loader
        return getattr(self._installed, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._installed.create_module(spec) if self._installed else None

    def exec_module(self, module: ModuleType) -> None:
        if self._installed:
            vars(module)["__loader__"] = vars(module)["__spec__"].loader = self._installed
            try:
                self._installed.exec_module(module)
            except Exception as error:  # whatever an extension raises when it does not fit this machine
                line = f"the installed apex cannot be imported ({error}); apex_compat stands in for it"
                importlib.import_module("warnings").warn(line, stacklevel=2)
                for name in [name for name in sys.modules if name.startswith("apex.")]:
                    del sys.modules[name]
                module.__path__ = []
        _complete(module)


def _complete(apex: ModuleType) -> None:
    """Let the packages that `apex` lacks be attributes of it: scripts say `import apex; apex.amp.initialize(...)`."""
    own: Callable[[str], Any] | None = vars(apex).get("__getattr__")

    def missing(name: str) -> Any:
        if name in PACKAGES:
            return importlib.import_module(f"apex.{name}")
        if own:
            return own(name)
        raise AttributeError(why_not(f"apex.{name}") or f"module 'apex' has no attribute {name!r}")

    vars(apex)["__getattr__"] = missing


def _apex_modules() -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in ("apex", *EXTENSIONS)]
