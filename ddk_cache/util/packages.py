"""What is installed."""

from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from ddk_cache.errors import ConfigError


def package_version(name: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def require(extra: str, *modules: str) -> None:
    """Raise ConfigError, which names the extra to install, if one of its modules is not installed."""
    if missing := [name for name in modules if find_spec(name) is None]:
        raise ConfigError(f"not installed: {', '.join(missing)}; pip install 'ddk-cache[{extra}]'")
