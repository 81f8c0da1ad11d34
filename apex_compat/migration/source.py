"""Changes parts of a script and leaves every other byte of it alone."""

from __future__ import annotations

import ast
import io
import tokenize

Located = ast.expr | ast.stmt | ast.keyword


class Source:
    """A script, its syntax tree, and changes to it.

    Attributes:
        tree: the syntax tree.
        parents: node -> the node that it is in.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        self.tree = ast.parse(text)
        self.parents = {child: node for node in ast.walk(self.tree) for child in ast.iter_child_nodes(node)}
        self._bytes = text.encode()  # the columns of ast count bytes
        self._lines = io.BytesIO(self._bytes).readlines()
        self._starts = [0]
        for line in self._lines:
            self._starts.append(self._starts[-1] + len(line))
        self._changes: list[tuple[int, int, bytes]] = []
        self._moved: dict[int, int] = {}
        self._inside_strings = _lines_inside_strings(text)

    def of(self, node: ast.AST) -> str:
        """Return the text of `node`."""
        return ast.get_source_segment(self.text, node) or ""

    def replace(self, node: ast.expr | ast.stmt, text: str) -> None:
        """Put `text` for `node`."""
        self._changes.append((self.start(node), self.end(node), text.encode()))

    def replace_between(self, start: int, end: int, text: str) -> None:
        """Put `text` for the bytes from `start` to `end`. What is around them can change, too."""
        self._changes.append((start, end, text.encode()))

    def replace_header(self, node: ast.With, text: str) -> None:
        """Put `text` for the line of a `with` statement up to its colon."""
        last = node.items[-1].optional_vars or node.items[-1].context_expr
        end = self._bytes.index(b":", self.end(last)) + 1
        self._changes.append((self.start(node), end, text.encode()))

    def between(self, one: ast.expr | ast.stmt, other: ast.expr | ast.stmt) -> str:
        """Return the text from the end of `one` to the start of `other`."""
        return self._bytes[self.end(one) : self.start(other)].decode()

    def delete_line(self, node: ast.stmt) -> None:
        """Delete the statement with its lines, or put `pass` where nothing else is in its block or on its line."""
        first, last = self._starts[node.lineno - 1], self._starts[node.end_lineno or node.lineno]
        alone = self._bytes[first : self.start(node)].isspace() or self.start(node) == first
        if len(self.block(node)) == 1 or not alone or b";" in self._bytes[self.end(node) : last]:
            self.replace(node, "pass")
        else:
            self._changes.append((first, last, b""))

    def insert(self, node: ast.stmt, lines: list[str], after: bool = False) -> None:
        """Put `lines` before or after a statement, as far in as it is; on its line, if it does not begin that."""
        if not self.begins_line(node):
            at = self.end(node) if after else self.start(node)
            text = "".join(f"; {line}" if after else f"{line}; " for line in lines)
            self._changes.append((at, at, text.encode()))
            return
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
        number = (node.end_lineno or node.lineno) if after else first - 1
        missing = b"" if self._lines[number - 1 if after else number].endswith(b"\n") or not after else b"\n"
        inserted = "".join(f"{self.margin(node)}{line}\n" for line in lines).encode()
        change = (self._starts[number], self._starts[number], missing + inserted)
        # What goes after one statement stands before what goes before the next.
        self._changes.insert(0 if after else len(self._changes), change)

    def can_move(self, nodes: list[ast.stmt]) -> bool:
        """Return True if the lines of `nodes` can be moved in and out: they are theirs alone, without long strings."""
        first, last = nodes[0].lineno, nodes[-1].end_lineno or nodes[-1].lineno
        return self.begins_line(nodes[0]) and not self._inside_strings & set(range(first, last + 1))

    def move(self, nodes: list[ast.stmt], by: int) -> None:
        """Move the lines of `nodes` in by `by` columns, or out where it is negative."""
        for number in range(nodes[0].lineno, (nodes[-1].end_lineno or nodes[-1].lineno) + 1):
            start, line = self._starts[number - 1], self._lines[number - 1]
            self._moved[number] = by
            if by > 0 and line.strip():
                self._changes.append((start, start, b"\t" if line.startswith(b"\t") else b" " * by))
            elif by < 0 and line[:-by].isspace():
                self._changes.append((start, start - by, b""))

    def join(self, node: ast.stmt, lines: list[str]) -> str:
        """Return `lines` for the place of a statement, as far in as it is; in one, if it does not begin its line."""
        return (f"\n{self.margin(node)}" if self.begins_line(node) else "; ").join(lines)

    def begins_line(self, node: ast.stmt) -> bool:
        """Return True if a statement is the first thing on its line."""
        return not self._lines[node.lineno - 1][: node.col_offset].strip()

    def margin(self, node: ast.stmt) -> str:
        """Return what stands left of a statement, less what it has been moved out."""
        line = self._lines[node.lineno - 1]
        return line[: len(line) - len(line.lstrip()) + min(0, self._moved.get(node.lineno, 0))].decode()

    def block(self, node: ast.stmt) -> list[ast.stmt]:
        """Return the statements of the block that `node` is in."""
        parent = self.parents[node]
        for name in ("body", "orelse", "finalbody"):
            block = getattr(parent, name, [])
            if isinstance(block, list) and node in block:
                return block
        return [node]

    def statement(self, node: ast.AST) -> ast.stmt:
        """Return the statement that `node` is in, one before which another can stand."""
        while not isinstance(node, ast.stmt) or self._bytes[self.start(node) :].startswith(b"elif"):
            node = self.parents[node]
        return node

    def scope(self, node: ast.AST) -> ast.AST:
        """Return the function that `node` is in, or the module."""
        node = self.parents.get(node, node)
        while not isinstance(node, (ast.Module, ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            node = self.parents[node]
        return node

    def above(self, node: ast.AST) -> list[ast.stmt]:
        """Return the statements around `node` within its function, the innermost first."""
        found, scope = [], self.scope(node)
        while node is not scope:
            if isinstance(node, ast.stmt):
                found.append(node)
            node = self.parents[node]
        return found

    def start(self, node: Located) -> int:
        """Return the byte at which `node` starts."""
        return self._starts[node.lineno - 1] + node.col_offset

    def end(self, node: Located) -> int:
        """Return the byte behind `node`."""
        return self._starts[(node.end_lineno or 1) - 1] + (node.end_col_offset or 0)

    def changed(self) -> str:
        """Return the script with all changes. One within another is left out."""
        result, done = [], 0
        for start, end, text in sorted(self._changes, key=lambda change: (change[0], change[0] != change[1])):
            if start >= done:
                result += [self._bytes[done:start], text]
                done = end
        return b"".join([*result, self._bytes[done:]]).decode()


def _lines_inside_strings(text: str) -> set[int]:
    """Return the numbers of the lines that begin within a string: spaces before them would change it."""
    inside: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.STRING or tokenize.tok_name[token.type].startswith("FSTRING"):
            inside.update(range(token.start[0] + 1, token.end[0] + 1))
    return inside
