"""The options of the trainers, and where they come from."""
