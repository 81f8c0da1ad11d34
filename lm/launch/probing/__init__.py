"""Probe the language model: its float64 reference, its modes, its weights, and the sentences of probe.json."""
