"""Short runs from a small cache, for the studies."""

from helpers.training import cache_folder, make_config

__all__ = ["cache_folder", "make_config"]
