"""Finds the lines that compute a loss: they go under autocast."""

from __future__ import annotations

import ast

from apex_compat.migration.source import Source


def find_region(source: Source, statement: ast.stmt, loss: ast.expr, models: set[str]) -> list[ast.stmt]:
    """Return the statements from the call of a model to the last one that sets the loss; none if they are not found.

    They are in the block of `statement`, before it, or in one around that block within the same function. No backward
    and no step is among them.

    Args:
        source: the script.
        statement: the one that uses the loss.
        loss: the loss in it.
        models: the texts by which the script calls its models.
    """
    wanted = {node.id for node in ast.walk(loss) if isinstance(node, ast.Name)}
    for around in source.above(statement):
        block = source.block(around)
        before = block[: block.index(around)]
        ends = [i for i, other in enumerate(before) if _assigned(other) & wanted]
        done = [i for i in range(ends[-1]) if _methods(before[i]) & {"backward", "step", "scale_loss"}] if ends else []
        first = done[-1] + 1 if done else 0
        starts = [i for i in range(first, ends[-1] + 1) if _calls(before[i], models)] if ends else []
        if starts:
            return before[starts[0] : ends[-1] + 1]
        new = [i for i in ends if i >= first and isinstance(before[i], ast.Assign) and _has_call(before[i])]
        if new:  # the loss comes from a function that knows the model
            return before[new[0] : ends[-1] + 1]
    return []


def merge(source: Source, regions: list[list[ast.stmt]]) -> list[list[ast.stmt]]:
    """Return the regions with those joined that overlap: two losses of one forward pass."""
    merged: list[list[ast.stmt]] = []
    for region in sorted(regions, key=lambda region: source.start(region[0])):
        last = merged[-1] if merged else []
        if last and region[0] in last:
            block = source.block(last[0])
            end = max(block.index(last[-1]), block.index(region[-1]))
            merged[-1] = block[block.index(last[0]) : end + 1]
        else:
            merged.append(region)
    return merged


def _assigned(statement: ast.stmt) -> set[str]:
    """Return the names that a statement sets, itself or in its blocks."""
    return {node.id for node in ast.walk(statement) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}


def _methods(statement: ast.stmt) -> set[str]:
    """Return the names of the methods that a statement calls."""
    calls = (node.func for node in ast.walk(statement) if isinstance(node, ast.Call))
    return {function.attr for function in calls if isinstance(function, ast.Attribute)}


def _has_call(statement: ast.stmt) -> bool:
    return any(isinstance(node, ast.Call) for node in ast.walk(statement))


def _calls(statement: ast.stmt, models: set[str]) -> bool:
    """Return True if the statement calls a model, a part of it or its forward, or hands it to a function.

    One that sets a model, such as that of initialize, does not compute with it.
    """
    if any(ast.unparse(n) in models for n in ast.walk(statement) if isinstance(getattr(n, "ctx", None), ast.Store)):
        return False
    for node in ast.walk(statement):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Attribute) and function.attr == "forward":
                function = function.value
            while isinstance(function, ast.Subscript):
                function = function.value
            names = [ast.unparse(function).removesuffix(".module"), *(ast.unparse(arg) for arg in node.args)]
            if models & set(names):
                return True
    return False
