"""One run of training, from its first step to its result."""
