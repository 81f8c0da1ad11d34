"""Replaces what scripts import from NVIDIA's apex, on any device. It imports torch alone."""

from apex_compat.checkpoint import load_apex_checkpoint
from apex_compat.provide import provide_apex

__all__ = ["load_apex_checkpoint", "provide_apex"]
