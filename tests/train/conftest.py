"""Short runs from a small cache, on the CPU."""

import torch
from helpers.training import cache_folder, make_config

__all__ = ["cache_folder", "make_config"]

torch.set_num_threads(1)
