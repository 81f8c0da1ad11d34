# ruff: noqa: N999  # apex's name
"""Has the functions of apex's extension apex_C, on any device."""

from apex_compat.parallel.flat import flatten, unflatten

__all__ = ["flatten", "unflatten"]
