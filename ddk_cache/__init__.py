"""Knowledge distillation from a cache of the teacher's log-probabilities: the cache's own library."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_cache.errors import CacheError
    from ddk_cache.reader import Cache, Domain, Rows, open_cache

__all__ = ["Cache", "CacheError", "Domain", "Rows", "open_cache"]


def __getattr__(name: str) -> Any:
    """Load zarr and its kind when a name is asked for, so that the command line answers at once."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddk_cache import errors, reader

    return getattr(errors if name == "CacheError" else reader, name)
