"""A run's output folder: whether it may be written to, and what is put there first."""

from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_train import checkpoint
from ddk_train.config import TrainConfig

OURS = {"cache", "student", "output_dir"}  # keys that the config.yaml of a run has


def find_start(config: TrainConfig, *, resume: bool) -> Path | None:
    """The checkpoint to go on from; None starts at the beginning.

    Raises
    ------
    ConfigError
        The folder is the student's own or the cache, lies inside a cache, holds what is no run's, or holds
        a run that is not to be resumed.
    """
    folder = Path(config.output_dir)
    _check_not_a_source(folder, config)
    try:
        is_used = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}") from error
    if not is_used:
        return None
    if not _is_a_run(folder):
        raise ConfigError(f"output_dir: {folder} holds what is no run of ours: name a new or an empty folder")
    if not resume:
        raise ConfigError(f"output_dir: {folder} holds a run already: add --resume to go on, or name another")
    return checkpoint.newest(folder)


def prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Make the output folder, with the resolved configuration in it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}") from error


def as_yaml(config: TrainConfig) -> str:
    """The resolved configuration, as it can be trained from again."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _check_not_a_source(folder: Path, config: TrainConfig) -> None:
    """What a run reads is not to be written over, under whatever name."""
    for key, source in (("student", Path(config.student)), ("cache", _local(config.cache))):
        if source is not None and source.is_dir() and folder.exists() and folder.samefile(source):
            raise ConfigError(f"output_dir: {folder} is the {key}, which would be overwritten: name another")
    for parent in folder.resolve().parents:
        if (parent / "zarr.json").is_file():
            raise ConfigError(f"output_dir: {folder} lies inside the cache {parent}: name a folder elsewhere")


def _local(cache: str) -> Path | None:
    """The folder of a cache; None where it is in an object store."""
    path = cache.removeprefix("file://")
    return None if "://" in path else Path(path)


def _is_a_run(folder: Path) -> bool:
    try:
        found = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(found, dict) and found.keys() >= OURS
