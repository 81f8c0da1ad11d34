"""Migrates the text of one script."""

from __future__ import annotations

import ast
from dataclasses import dataclass

from apex_compat.migration.amp_calls import AmpCalls, amp_remark
from apex_compat.migration.classes import remark_for, rewrite
from apex_compat.migration.names import Imported, Reference, find_imports, find_references
from apex_compat.migration.numbers import differing_calls
from apex_compat.migration.source import Source
from apex_compat.not_offered import why_not


@dataclass(frozen=True)
class Migrated:
    """Holds what becomes of a script.

    Attributes:
        text: the script after all changes that are mechanical.
        remarks: (line number, what is there, what it is in torch), in their order.
    """

    text: str
    remarks: list[tuple[int, str, str]]


def migrate_text(text: str) -> Migrated:
    """Change the apex calls of a script to those of torch, where that is mechanical.

    What is not stays, and is imported from apex_compat. The script then runs without apex.

    Raises:
        SyntaxError: `text` is not Python.
    """
    source = Source(text)
    imports = find_imports(source)
    references = find_references(source, imports)
    remarks: list[tuple[ast.AST, str]] = []
    of_amp = [r for r in references if r.name.startswith("apex.amp")]
    kept = _rewrite_amp(source, of_amp, remarks)
    needs_torch = any(reference.local not in kept for reference in of_amp)
    for reference in references:
        if not reference.name.startswith("apex.amp"):
            changed, remark = rewrite(source, reference)
            remarks.append((reference.node, remark))
            kept |= set() if changed else {reference.local}
            needs_torch |= changed
    for imported in imports:
        if imported.local == "*":
            remarks.append((imported.statement, remark_for(imported.name.removesuffix(".*"))))
            kept.add("*")
    _rewrite_imports(source, imports, kept, needs_torch)
    lines = {(node.lineno, _named(source, node), remark) for node, remark in remarks}  # type: ignore[attr-defined]
    return Migrated(source.changed(), sorted(lines))


def _rewrite_amp(source: Source, references: list[Reference], remarks: list[tuple[ast.AST, str]]) -> set[str]:
    """Change the uses of apex.amp; return the names in the script that are still needed."""
    if not references:
        return set()
    calls = AmpCalls(source, references)
    for reference in references:
        remarks += [(reference.node, line) for line in amp_remark(reference, calls.obstacle)]
    if not calls.obstacle:
        calls.rewrite()
        remarks += differing_calls(source)
    remarks += calls.remarks
    done = ("initialize", "scale_loss", "master_params", "state_dict", "load_state_dict", "disable_casts")
    changed = {f"apex.amp.{name}" for name in done} if not calls.obstacle else set()
    return {r.local for r in references if r.name not in changed or r.called is None}


def _rewrite_imports(source: Source, imports: list[Imported], kept: set[str], needs_torch: bool) -> None:
    """Leave out the imports that nothing needs any more, and let the others be of apex_compat."""
    statements: dict[ast.Import | ast.ImportFrom, list[Imported]] = {}
    for imported in imports:
        statements.setdefault(imported.statement, []).append(imported)
    has_torch = not needs_torch or any(
        isinstance(node, ast.Import) and any(alias.name == "torch" and not alias.asname for alias in node.names)
        for node in source.tree.body
    )
    for number, (statement, names) in enumerate(statements.items()):
        if number == 0 and not has_torch:
            _import_torch(source, statement)
        ours = {imported.alias for imported in names}
        lines = [_import_line(imported) for imported in names if imported.local in kept]
        others = [alias for alias in statement.names if alias not in ours]
        if others:
            lines.insert(0, f"import {', '.join(map(ast.unparse, others))}")
        if lines:
            source.replace(statement, source.join(statement, lines))
        else:
            source.delete_line(statement)


def _import_torch(source: Source, statement: ast.stmt) -> None:
    """Import torch for the whole script: before `statement`, or before all others if that is in a function."""
    head = source.tree.body[: bool(ast.get_docstring(source.tree, clean=False) is not None)]
    head += [n for n in source.tree.body if isinstance(n, ast.ImportFrom) and n.module == "__future__"]
    if isinstance(source.scope(statement), ast.Module):
        source.insert(source.above(statement)[-1], ["import torch"])
    elif head:
        source.insert(head[-1], ["import torch"], after=True)
    else:
        source.insert(source.tree.body[0], ["import torch"])


def _import_line(imported: Imported) -> str:
    """Return the import of the same name from apex_compat, or from apex where that does not have it."""
    name = imported.name
    if not why_not(name):
        name = "apex_compat" + (name.removeprefix("apex") if name.startswith("apex.") or name == "apex" else f".{name}")
    package, _, last = name.rpartition(".")
    renamed = "" if imported.local == last else f" as {imported.local}"
    return f"from {package} import {last}{renamed}" if package else f"import {name}{renamed}"


def _named(source: Source, node: ast.AST) -> str:
    """Return the text of a node in one line, a call without its arguments."""
    text = source.of(node.func if isinstance(node, ast.Call) else node)
    return " ".join(text.split())
