"""Finds what a script calls apex's things."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from apex_compat.migration.source import Source
from apex_compat.provide import EXTENSIONS

ROOTS = ("apex", "apex_compat", *EXTENSIONS)


@dataclass(frozen=True)
class Imported:
    """A name that an import statement binds.

    Attributes:
        statement: the import.
        alias: the part of it.
        local: the name in the script; "*" for all.
        name: apex's name of the thing, "apex.amp".
    """

    statement: ast.Import | ast.ImportFrom
    alias: ast.alias
    local: str
    name: str


@dataclass(frozen=True)
class Reference:
    """A use of something of apex, under its full name "apex.amp.scale_loss"; `called` is the call, if it is one."""

    node: ast.expr
    name: str
    local: str
    called: ast.Call | None


def find_imports(source: Source) -> list[Imported]:
    """Return what the script imports of apex, or of apex_compat."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if _root(alias.name) in ROOTS:
                    name = alias.name if alias.asname else _root(alias.name)
                    found.append(Imported(node, alias, alias.asname or name, _apex(name)))
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and _root(node.module or "") in ROOTS:
            for alias in node.names:
                found.append(Imported(node, alias, alias.asname or alias.name, _apex(f"{node.module}.{alias.name}")))
    return found


def find_references(source: Source, imports: list[Imported]) -> list[Reference]:
    """Return the uses of what `imports` bind, in the order of the script."""
    names = {imported.local: imported.name for imported in imports}
    found = []
    for node in ast.walk(source.tree):
        if not (isinstance(node, ast.Name) and node.id in names and isinstance(node.ctx, ast.Load)):
            continue
        whole: ast.expr = node
        name = names[node.id]
        parent = source.parents[whole]
        while isinstance(parent, ast.Attribute):
            whole, name, parent = parent, f"{name}.{parent.attr}", source.parents[parent]
        called = parent if isinstance(parent, ast.Call) and parent.func is whole else None
        found.append(Reference(whole, _shortest(name), node.id, called))
    return sorted(found, key=lambda reference: source.start(reference.node))


def _root(name: str) -> str:
    return name.partition(".")[0]


def _apex(name: str) -> str:
    return "apex" + name.removeprefix("apex_compat") if _root(name) == "apex_compat" else name


def _shortest(name: str) -> str:
    """Return the name without the submodule that a thing is in: apex.parallel.LARC.LARC is apex.parallel.LARC."""
    for package, modules in {
        "apex.parallel": ("distributed", "LARC", "sync_batchnorm", "optimized_sync_batchnorm"),
        "apex.normalization": ("fused_layer_norm",),
        "apex.optimizers": ("fused_adam", "fused_sgd", "fused_lamb", "fused_novograd", "fused_adagrad"),
        "apex.amp": ("frontend", "handle", "amp"),
    }.items():
        for module in modules:
            if name.startswith(f"{package}.{module}."):
                return f"{package}.{name.removeprefix(f'{package}.{module}.')}"
    return name
