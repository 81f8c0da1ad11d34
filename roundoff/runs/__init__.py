"""The record of a run: written by any loop, read by anybody."""
