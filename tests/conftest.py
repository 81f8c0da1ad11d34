"""Set-up shared by all tests."""

import torch

# The suite runs one process a core; more threads than cores only get in each other's way.
torch.set_num_threads(1)
