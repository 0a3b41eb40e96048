"""What is installed."""

from importlib.metadata import PackageNotFoundError, version


def package_version(name: str) -> str:
    """Return the installed version of a package, or "not installed"."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
