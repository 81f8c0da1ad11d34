"""The corpus, and the batches that are made of it."""
