"""The errors that a user can meet; the command line turns each into one line and an exit code."""


class ConfigError(ValueError):
    """The command line or the configuration is wrong; the message says where, and what to write instead."""

    exit_code = 2


class CacheError(Exception):
    """A cache cannot be read or written: damaged, incomplete, of an unknown version, or unreachable."""

    exit_code = 1


class VersionError(CacheError):
    """A cache has a format version that this release does not read."""


class UnreachableError(CacheError):
    """The store does not respond or denies access, so that nothing is known about its content."""


class TooLargeError(CacheError):
    """An object is larger than allowed, and was not read."""


class CacheNotFoundError(CacheError):
    """There is no cache at this path or URL."""

    exit_code = 2


class IncompleteCacheError(CacheError):
    """The cache is not complete, and ``allow_incomplete`` is not set."""

    exit_code = 2


def printable(text: str) -> str:
    """Return ``text`` with control characters escaped, which a name from a downloaded cache may contain."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 row" or "1,200 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"
