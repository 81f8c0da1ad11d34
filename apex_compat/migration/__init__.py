"""Turns the apex calls of a script into those of torch.amp, and says where numbers will differ."""
