"""Makes `import apex` give this package's modules where apex no longer has them."""

import importlib
import importlib.util
import sys
import warnings
from importlib.machinery import ModuleSpec
from types import ModuleType, TracebackType

MODULES = (
    "amp",
    "amp._amp_state",
    "amp._initialize",
    "amp._process_optimizer",
    "amp.amp",
    "amp.compat",
    "amp.frontend",
    "amp.handle",
    "amp.lists",
    "amp.lists.functional_overrides",
    "amp.lists.tensor_overrides",
    "amp.lists.torch_overrides",
    "amp.opt",
    "amp.rnn_compat",
    "amp.scaler",
    "amp.utils",
    "amp.wrap",
    "fp16_utils",
    "fp16_utils.fp16_optimizer",
    "fp16_utils.fp16util",
    "fp16_utils.loss_scaler",
    "parallel",
    "parallel.LARC",
    "parallel.distributed",
    "parallel.optimized_sync_batchnorm",
    "parallel.sync_batchnorm",
)
"""Lists the modules that scripts import from apex, as apex and this package both name them.

A submodule must be listed, or its import would load a second copy with classes of its own. parallel.multiproc
is not listed: it has no class, and `python -m` refuses a module that has another name of its own.
"""
SUBPACKAGES = tuple(name for name in MODULES if "." not in name)


class ProvidedApex:
    """Provides this package's modules as apex's, from its construction until `restore` or the end of `with`."""

    def __init__(self) -> None:
        self._modules_before = {name: sys.modules[name] for name in _apex_modules()}
        self._apex = _installed_apex() or _stand_in()
        self._attributes_before = {name: vars(self._apex)[name] for name in SUBPACKAGES if name in vars(self._apex)}
        sys.modules["apex"] = self._apex
        for name in MODULES:
            sys.modules[f"apex.{name}"] = importlib.import_module(f"apex_compat.{name}")
        for name in SUBPACKAGES:
            setattr(self._apex, name, sys.modules[f"apex.{name}"])
        self._restored = False

    def restore(self) -> None:
        """Leave imports of apex as they were found. A second call does nothing."""
        if self._restored:
            return
        self._restored = True
        for name in SUBPACKAGES:
            delattr(self._apex, name)
        vars(self._apex).update(self._attributes_before)
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
    """Make `import apex.fp16_utils` give `apex_compat.fp16_utils`, from now on or within a `with` statement.

        apex_compat.provide_apex()
        from apex.fp16_utils import FP16_Optimizer

        with apex_compat.provide_apex():
            import old_training_code

    An installed apex keeps everything else. Where none is installed, a module "apex" with nothing but
    fp16_utils stands in for it. It also stands in for an apex that cannot be imported, and a warning says so.

    Returns:
        An object whose `restore()` undoes it. The end of `with` calls `restore()` too.
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
    apex = ModuleType("apex", f"Stands in for apex: it has {', '.join(SUBPACKAGES)} and nothing else.")
    apex.__spec__ = ModuleSpec("apex", None, is_package=True)
    apex.__path__ = []  # a package, or Python would not look for its submodules
    return apex
