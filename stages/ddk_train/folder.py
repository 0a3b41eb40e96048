"""A run's output folder: whether it may be written to, and what is put there first."""

from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_train import checkpoint
from ddk_train.config import TrainConfig


def find_start(folder: Path, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None starts at the beginning.

    Raises
    ------
    ConfigError
        The folder holds a run, and it is not to be resumed.
    """
    if resume:
        return checkpoint.newest(folder)
    if (folder / "config.yaml").exists() or checkpoint.newest(folder):
        raise ConfigError(f"output_dir: {folder} holds a run already: add --resume to go on, or name another")
    return None


def prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Make the output folder, with the resolved configuration in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
        (folder / "config.yaml").write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}") from error
