"""Knowledge distillation from a cache of the teacher's log-probabilities: reading the cache."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_cache.cache.reader import Cache, Domain, Rows, open_cache
    from ddk_cache.errors import CacheError, ConfigError

    __version__: str

__all__ = ["Cache", "CacheError", "ConfigError", "Domain", "Rows", "__version__", "open_cache"]


def __getattr__(name: str) -> Any:
    """Import zarr and what needs it only when a name is used, so that the command line answers at once."""
    if name == "__version__":
        from importlib.metadata import version

        return version("ddk-cache")
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from ddk_cache import errors
    from ddk_cache.cache import reader

    return getattr(errors if name in ("CacheError", "ConfigError") else reader, name)
