"""Runs what a process does on CUDA on the CPU, from its import of torch on.

The process may be a helper that never imports torch, which takes seconds. So nothing is imported before.
"""

from __future__ import annotations

import importlib
import sys
from contextlib import ExitStack
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_until_exit = ExitStack()


def use_cpu_after_import_of_torch() -> None:
    """Enter `cuda_on_cpu` for the rest of this process as soon as torch has been imported."""
    sys.meta_path.insert(0, _TorchFinder())


class _TorchFinder:
    """Finds torch as the other finders do, and takes part in its loading."""

    def find_spec(self, fullname: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if fullname != "torch":
            return None
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(fullname, path, target)
            if spec and spec.loader:
                spec.loader = _TorchLoader(spec.loader, self)  # type: ignore[assignment]
                return spec
        return None


class _TorchLoader:
    def __init__(self, loader: Any, finder: _TorchFinder) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__loader__"] = vars(module)["__spec__"].loader = self._loader
        sys.meta_path.remove(self._finder)
        self._loader.exec_module(module)
        _until_exit.enter_context(importlib.import_module("apex_compat.cuda_on_cpu").cuda_on_cpu())
