"""What a precision mode does to the gradient, measured at fixed weights instead of in training."""
