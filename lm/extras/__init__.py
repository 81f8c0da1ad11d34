"""Front ends that are imported only where a user asks for them."""
