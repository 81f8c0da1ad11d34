"""Define the errors that a user causes or meets, each as one line of text."""


class UsageError(Exception):
    """Says that a request cannot be met. The text is one line: what was given, what is allowed, what to do."""

    exit_code = 2


class BadFileError(ValueError):
    """A file is not what it should be. The text is one line: what is wrong with it."""


class RunError(Exception):
    """A run that was rightly asked for has failed. The text is one line: what happened, and what to try."""

    exit_code = 1


class CheckError(RunError):
    """A figure of a probe is above its bound. The text names mode, tensor, figure and bound."""


def printable(text: object, limit: int = 200) -> str:
    """Return `text` as one line of at most `limit` characters in which a terminal finds nothing to obey."""
    shown = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text)[: limit + 1])
    return shown if len(shown) <= limit else shown[: limit - 1] + "…"


def described(value: object) -> str:
    """Return in words what `value` is, such as "a tensor of shape (2, 2)", "a dict", "None" or "'fast'"."""
    if value is None or isinstance(value, bool | int | float | complex | str):
        return printable(repr(value), 60)
    name = {"Tensor": "tensor", "ndarray": "array"}.get(type(value).__name__, type(value).__name__)
    shape = getattr(value, "shape", None)
    of = f" of shape {tuple(shape)}" if isinstance(shape, tuple) else ""
    return printable(f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}{of}")
