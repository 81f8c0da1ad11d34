"""Runs of trainers and of probes as processes."""
