"""What is installed."""

from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ddk_cache.errors import ConfigError


def package_version(*names: str) -> str:
    """Return the installed version of a package, or "not installed"; vLLM's CPU build has another name."""
    for name in names:
        with suppress(PackageNotFoundError):
            return version(name)
    return "not installed"


def require(extra: str, *modules: str) -> None:
    """Raise ConfigError, which names the extra to install, if one of its modules is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install 'ddk-cache[{extra}]'")
