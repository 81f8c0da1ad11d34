"""Measurements of this project against plain PyTorch: `python -m benchmarks --help`."""
