"""Training a language model under several kinds of precision management."""

__version__ = "0.1.0"
