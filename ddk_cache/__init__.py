"""Knowledge distillation from a cache of the teacher's log-probabilities: reading the cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_cache.cache.reader import Cache, Domain, open_cache
    from ddk_cache.cache.rows import Rows
    from ddk_cache.cache.split import Split
    from ddk_cache.errors import CacheError, ConfigError

    __version__: str

__all__ = ["Cache", "CacheError", "ConfigError", "Domain", "Rows", "Split", "__version__", "open_cache"]

if not TYPE_CHECKING:  # a type checker would take any name for one of the module

    def __getattr__(name: str) -> Any:
        """Import zarr and what needs it only when a name is used, so that the command line starts fast."""
        if name == "__version__":
            return import_module("importlib.metadata").version("ddk-cache")
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        module = {
            "Rows": "cache.rows",
            "Split": "cache.split",
            "CacheError": "errors",
            "ConfigError": "errors",
        }
        return getattr(import_module(f"ddk_cache.{module.get(name, 'cache.reader')}"), name)
