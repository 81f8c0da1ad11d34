"""The language model: its layers, its loss, and its files."""
