"""What a probe of the language model needs."""
