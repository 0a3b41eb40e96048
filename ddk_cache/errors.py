"""The two kinds of trouble a user can meet; the command line turns each into one line and an exit code."""


class ConfigError(ValueError):
    """The command line or the configuration is wrong; the message says where and what would be right."""

    exit_code = 2


class CacheError(Exception):
    """A cache cannot be read or written: damaged, incomplete, of an unknown version, or out of reach."""

    exit_code = 1


class VersionError(CacheError):
    """A cache has a format version that this release does not read."""


class UnreachableError(CacheError):
    """The place does not answer, or does not let read or write: nothing is known of what lies there."""


class TooLargeError(CacheError):
    """An object has more bytes than it may; they were not read."""


class CacheNotFoundError(CacheError):
    """There is no cache at the place that was named."""

    exit_code = 2


class IncompleteCacheError(CacheError):
    """The cache is not finished, and the user did not say to use what is there."""

    exit_code = 2


def printable(text: str) -> str:
    """``text`` without what moves a cursor, colours or breaks a line: a name may be a stranger's."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def counted(number: int, noun: str) -> str:
    """A number and what it counts: "1 row", "1,200 rows"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"
