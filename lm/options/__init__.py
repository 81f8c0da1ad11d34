"""What the trainers are told."""
