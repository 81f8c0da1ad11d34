"""Measure what a precision mode does to the gradient: error, bias, lost elements, and the loss scales that serve."""
