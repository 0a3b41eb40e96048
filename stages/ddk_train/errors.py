"""Errors of a training run other than mistakes in its configuration."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from signal import Signals

from safetensors import SafetensorError
from torch.distributed.checkpoint.api import CheckpointException


class TrainingError(RuntimeError):
    """The run cannot continue; the message gives the reason, and the checkpoint to resume from."""


class Interrupted(Exception):
    """A process of the run received a signal; all processes raise this at the same step."""


class Stopped(TrainingError):
    """A signal stopped the run; the message gives the checkpoint to resume from."""

    def __init__(self, message: str, signal: Signals) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal  # a shell's convention


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Raise errors of writing, such as a full disk, as TrainingError."""
    try:
        yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        raise TrainingError(f"{path}: cannot be written: {cause}") from error
    except (SafetensorError, OSError) as error:
        raise TrainingError(f"{path}: cannot be written: {error}") from error
