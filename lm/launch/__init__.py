"""Processes of a comparison: runs of trainers, and probes."""
