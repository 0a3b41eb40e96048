"""Errors for users; the command line turns each into one line and an exit code."""

from pydantic import ValidationError

TORCHVISION = "torchvision does not fit this torch; pip uninstall torchvision or install the matching version"


class ConfigError(ValueError):
    """The command line or the configuration is wrong; the message says where, and what to write instead."""

    exit_code = 2


class CacheError(Exception):
    """A cache cannot be read or written: damaged, incomplete, of an unknown version, or unreachable."""

    exit_code = 1


class VersionError(CacheError):
    """A cache has a format version that this release does not read."""


class UnreachableError(CacheError):
    """The store does not respond or denies access; its content is unknown."""


class DamagedError(CacheError):
    """Content of a cache is damaged or foreign, and a build may replace it."""


class TooLargeError(DamagedError):
    """An object is larger than allowed, and was not read."""


class CacheNotFoundError(CacheError):
    """There is no cache at this path or URL."""

    exit_code = 2


class IncompleteCacheError(CacheError):
    """The cache is not complete, and ``allow_incomplete`` is not set."""

    exit_code = 2


def printable(text: str, keep: str = "") -> str:
    """Return ``text`` with control characters escaped, except ``keep``: a downloaded cache may have any."""
    return "".join(x if x.isprintable() or x in keep else repr(x)[1:-1] for x in text)


def without_markup(text: str) -> str:
    """Return ``text`` without characters that have a meaning in Markdown or HTML."""
    return "".join(letter for letter in text if letter.isprintable() and letter not in "`|<>[]")


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, such as "1 row" or "1,200 rows"."""
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def brief(error: BaseException, limit: int = 300) -> str:
    """Return an error's message in one line of at most about ``limit`` characters.

    Import errors name their cause: transformers reports only which of its own modules did not load.
    """
    text = str(error)
    if isinstance(error, ValidationError):
        problems = ((".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors())
        text = "; ".join(f"{key}: {message}" if key else message for key, message in problems)
    elif (cause := _import_cause(error)) is not error:
        hints = [TORCHVISION] if "torchvision" in str(cause) else []
        text = ": ".join([text.partition(". ")[0], str(cause) or type(cause).__name__, *hints])
    line = " ".join(text.split()).removeprefix("Value error, ") or type(error).__name__
    return line if len(line) <= limit else f"{line[:limit].rstrip()} ..."


def _import_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain of failed imports, or ``error`` itself."""
    while isinstance(error, ImportError):
        is_cause = isinstance(error.__context__, ImportError | RuntimeError | OSError)
        cause = error.__cause__ or (error.__context__ if is_cause else None)
        if cause is None:
            break
        error = cause
    return error
