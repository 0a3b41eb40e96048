"""Stage one: run the teacher once and write the cache."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ddk_build.build import build_cache
    from ddk_build.config import BuildConfig

__all__ = ["BuildConfig", "build_cache"]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the build's imports take seconds."""
    if name == "build_cache":
        from ddk_build.build import build_cache

        return build_cache
    if name == "BuildConfig":
        from ddk_build.config import BuildConfig

        return BuildConfig
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
