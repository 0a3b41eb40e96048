"""What can go wrong during a run that is not a mistake in its configuration."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


class TrainingError(RuntimeError):
    """The run cannot go on; the message says why, and from where it can be resumed."""


class Interrupted(Exception):
    """A process of the run was told to stop, at a moment that all processes agree upon."""


class Stopped(TrainingError):
    """The run was told to stop and has; the message says what was saved and how to go on."""

    def __init__(self, message: str, signal: signal.Signals) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal  # as a shell says it


@contextmanager
def writing(place: Path) -> Iterator[None]:
    """While weights are written; a full disk and the like come as errors of several kinds."""
    try:
        yield
    except CheckpointException as error:  # of one process or several; each has the first one's line
        cause = next(iter(error.failures.values()))[0]
        raise TrainingError(f"{place}: cannot be written: {cause}") from error
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{place}: cannot be written: {error}") from error
