"""Finds the order of backward and step in a script: one loss scale must serve from the one to the other."""

from __future__ import annotations

import ast
from dataclasses import dataclass
from itertools import pairwise

from apex_compat.migration.source import Source


@dataclass(frozen=True, eq=False)
class Event:
    """A backward or a step.

    Attributes:
        statement: the one that it is; for a step in a loop over optimizers, the loop.
        scope: the function that it is in.
        optimizers: the texts by which the script calls its optimizers.
        at: the byte at which it starts.
    """

    statement: ast.stmt
    scope: ast.AST
    optimizers: frozenset[str]
    at: int


def statements_to_update_after(source: Source, losses: list[Event], steps: list[Event]) -> tuple[list[ast.stmt], str]:
    """Return after which statements the scale may move, and an obstacle if there is no such place.

    It may not move between a backward and the last step that uses its gradients.
    """
    groups = [[step] for step in steps]
    for loss in losses:
        joined = _served(loss, losses, steps)
        touched = [group for group in groups if any(step in joined for step in group)]
        merged = sorted((step for group in touched for step in group), key=lambda step: step.at)
        groups = [*(group for group in groups if group not in touched), *filter(None, [merged])]
        if _outlives_an_update(source, loss, steps, merged):
            return [], f"gradients of line {loss.statement.lineno} wait for a later step while another optimizer steps"
    lasts: list[Event] = []
    for group in sorted(groups, key=lambda group: group[0].at):
        blocks = [source.block(step.statement) for step in group]
        if any(block != blocks[0] for block in blocks) and any(s.optimizers != group[0].optimizers for s in group):
            return [], f"the steps of line {group[0].statement.lineno} and of others are taken under unlike conditions"
        lasts += group if any(block != blocks[0] for block in blocks) else group[-1:]
    return [step.statement for step in _once_a_block(source, lasts, groups)], ""


def _served(loss: Event, losses: list[Event], steps: list[Event]) -> list[Event]:
    """Return the steps from a backward to the one that uses its gradients."""
    later = [step for step in steps if step.scope is loss.scope and step.at > loss.at]
    if not later:
        alone = [step for step in steps if not any(other.scope is step.scope for other in losses)]
        return alone if not any(step.scope is loss.scope for step in steps) else []
    own = [step.at for step in later if step.optimizers & loss.optimizers]
    others = [other.at for other in losses if other.scope is loss.scope and other.at > loss.at]
    end = own[0] if own else min(others, default=later[-1].at)
    return [step for step in later if step.at <= end]


def _outlives_an_update(source: Source, loss: Event, steps: list[Event], served: list[Event]) -> bool:
    """Return True if the step is not taken after each backward, and other optimizers step meanwhile."""
    around = [source.block(statement) for statement in source.above(loss.statement)]
    waits = any(step.scope is loss.scope and source.block(step.statement) not in around for step in served)
    own = {name for step in served for name in step.optimizers}
    return waits and any(s.scope is loss.scope and s not in served and not s.optimizers & own for s in steps)


def _once_a_block(source: Source, lasts: list[Event], groups: list[list[Event]]) -> list[Event]:
    """Return the steps with those left out that another optimizer's step follows in their block."""
    kept: list[Event] = []
    names: dict[int, set[str]] = {}
    for step in lasts:
        block = id(source.block(step.statement))
        own = {name for group in groups if step in group for other in group for name in other.optimizers}
        before = next((other for other in kept[::-1] if id(source.block(other.statement)) == block), None)
        if before and not names[block] & own:
            kept.remove(before)
            own |= names[block]
        names[block] = own
        kept.append(step)
    return kept


def in_loop_between(source: Source, statement: ast.stmt, block: list[ast.stmt]) -> bool | None:
    """Return True if a loop is between a statement and a block around it, and None if the block is not around it."""
    loop = False
    for around in source.above(statement):
        loop |= around is not statement and isinstance(around, (ast.For, ast.While))
        if source.block(around) == block:
            return loop
    return None


def are_exclusive(source: Source, one: ast.stmt, other: ast.stmt) -> bool:
    """Return True if two statements are in the two branches of one `if`."""
    branches = []
    for statement in (one, other):
        above = source.above(statement)
        branches.append({id(a): source.block(b) is a.orelse for b, a in pairwise(above) if isinstance(a, ast.If)})
    first, second = branches
    return any(first[key] != second[key] for key in first.keys() & second.keys())
