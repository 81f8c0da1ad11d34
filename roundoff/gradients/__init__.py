"""What does a mode do to the gradient?"""
