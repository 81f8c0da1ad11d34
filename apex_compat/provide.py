"""Importing apex.fp16_utils where it no longer is: `provide_apex`."""

import importlib
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType

# The submodules that scripts import from, too.
SUBMODULES = ("fp16_optimizer", "fp16util", "loss_scaler")


class ProvidedApex:
    """apex.fp16_utils can be imported from when this is constructed until `restore` or the end of `with`."""

    def __init__(self) -> None:
        self._modules_before = {name: sys.modules[name] for name in _apex_modules()}
        self._apex = _installed_apex() or _stand_in()
        self._attribute_before = vars(self._apex).get("fp16_utils")
        package = importlib.import_module("apex_compat.fp16_utils")
        sys.modules["apex"] = self._apex
        sys.modules["apex.fp16_utils"] = package
        for name in SUBMODULES:
            # Or an import of it would load a second copy, with classes of its own.
            sys.modules[f"apex.fp16_utils.{name}"] = importlib.import_module(f"apex_compat.fp16_utils.{name}")
        self._apex.fp16_utils = package  # type: ignore[attr-defined]
        self._restored = False

    def restore(self) -> None:
        """Leave imports of apex as they were found. A second call does nothing."""
        if self._restored:
            return
        self._restored = True
        del self._apex.fp16_utils
        if self._attribute_before is not None:
            self._apex.fp16_utils = self._attribute_before  # type: ignore[attr-defined]
        for name in _apex_modules():
            del sys.modules[name]
        sys.modules.update(self._modules_before)

    def __enter__(self) -> "ProvidedApex":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()


def provide_apex() -> ProvidedApex:
    """Make `import apex.fp16_utils` give this package, from now on or within a `with` statement.

        apex_compat.provide_apex()
        from apex.fp16_utils import FP16_Optimizer

        with apex_compat.provide_apex():
            import old_training_code

    An installed apex keeps all else it has. Where there is none, or it cannot be imported (a warning says
    so), a module "apex" with nothing but fp16_utils stands in for it.

    Returns:
        An object whose `restore()`, also called at the end of `with`, undoes it.
    """
    return ProvidedApex()


def _apex_modules() -> list[str]:
    return [name for name in sys.modules if name == "apex" or name.startswith("apex.")]


def _installed_apex() -> ModuleType | None:
    if "apex" not in sys.modules and importlib.util.find_spec("apex") is None:
        return None
    try:
        return importlib.import_module("apex")
    except Exception as error:  # whatever an extension module raises when it does not fit this machine
        warnings.warn(f"the installed apex cannot be imported ({error}); apex_compat stands in for it", stacklevel=4)
        return None


def _stand_in() -> ModuleType:
    apex = ModuleType("apex", "Stands in for apex: it has fp16_utils and nothing else.")
    apex.__spec__ = ModuleSpec("apex", None, is_package=True)
    apex.__path__ = []  # a package, or Python would not look for apex.fp16_utils in it
    return apex
