"""Has the interface of apex.mlp."""

from apex_compat.mlp.mlp import MLP

__all__ = ["MLP"]
