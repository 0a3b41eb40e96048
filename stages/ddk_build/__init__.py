"""Stage one: run the teacher once and write the cache."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_build.build import build_cache
    from ddk_build.config import BuildConfig

__all__ = ["BuildConfig", "build_cache"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the build's imports take seconds."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = "ddk_build.build" if name == "build_cache" else "ddk_build.config"
    return getattr(import_module(module), name)
