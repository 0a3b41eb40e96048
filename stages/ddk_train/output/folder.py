"""Check that a run may write to its output folder, and prepare it."""

from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.output import checkpoint

RUN_KEYS = {"cache", "student", "output_dir"}  # in the config.yaml of every run


def find_start(config: TrainConfig, *, resume: bool) -> Path | None:
    """Return the checkpoint to resume from, or None to start at the beginning.

    Raises ConfigError if the folder is the student or the cache, is inside a cache, has files that are not a
    run's, or has a run and ``resume`` is not set.
    """
    folder = Path(config.output_dir)
    _check_not_a_source(folder, config)
    try:
        is_used = folder.exists() and any(folder.iterdir())
    except OSError as error:
        raise _not_writable(folder, error) from error
    if not is_used:
        return None
    if not _is_run(folder):
        raise ConfigError(
            f"output_dir: {folder} has files that are not a run's: name a new or an empty folder"
        )
    if not resume:
        raise ConfigError(f"output_dir: {folder} already has a run: add --resume, or name another folder")
    return checkpoint.newest(folder)


def prepare_folder(folder: Path, config: TrainConfig) -> None:
    """Create the output folder and write the resolved configuration to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.yaml").write_text(as_yaml(config), encoding="utf-8")
    except OSError as error:
        raise _not_writable(folder, error) from error


def as_yaml(config: TrainConfig) -> str:
    """Return the resolved configuration as the text of a configuration file."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def _not_writable(folder: Path, error: OSError) -> ConfigError:
    return ConfigError(f"output_dir: cannot write to {folder}: {error.strerror}")


def _check_not_a_source(folder: Path, config: TrainConfig) -> None:
    """Raise ConfigError for a folder that the run reads, under any path."""
    caches = (("cache", url.removeprefix("file://")) for url in config.caches)
    for key, source in (("student", config.student), *caches):
        if Path(source).is_dir() and folder.exists() and folder.samefile(source):
            raise ConfigError(f"output_dir: {folder} is the {key}, which would be overwritten: name another")
    for parent in folder.resolve().parents:
        if (parent / "zarr.json").is_file():
            raise ConfigError(f"output_dir: {folder} is inside the cache {parent}: name a folder elsewhere")


def _is_run(folder: Path) -> bool:
    try:
        config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.keys() >= RUN_KEYS
