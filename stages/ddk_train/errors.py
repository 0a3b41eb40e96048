"""What can go wrong during a run that is not a mistake in its configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and from where it can be resumed."""


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """While weights are written; safetensors has an error of its own for a full disk and the like."""
    try:
        yield
    except SafetensorError as error:
        raise TrainingError(f"{place}: cannot be written: {error}") from error
