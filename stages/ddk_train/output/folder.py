"""Check that a run may write to its output folder, and hold its lock."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import yaml

from ddk_cache.errors import ConfigError
from ddk_cache.storage.folder import Folder
from ddk_cache.storage.lock import LOCK_KEY, locked
from ddk_cache.util import durable
from ddk_train.config import TrainConfig

RUN_KEYS = {"cache", "student", "output_dir"}  # in the config.yaml of every run
MAX_CONFIG_BYTES = 1 << 20


def check_folder(config: TrainConfig, *, resume: bool) -> None:
    """Raise ConfigError if the output folder cannot be used.

    It must not be the student or the cache, nor inside a cache, nor have files that are not a run's. With
    ``resume`` it must have a run, and without it none.
    """
    folder = Path(config.output_dir)
    _check_not_a_source(folder, config)
    try:
        names = [path.name for path in folder.iterdir()] if folder.exists() else []
    except OSError as error:
        raise _not_writable(folder, error) from error
    if all(name == LOCK_KEY or durable.is_staged(name) for name in names):  # a run killed at its start
        if resume:
            raise ConfigError(f"--resume: output_dir {folder} has no run; leave --resume out to start one")
        return
    if not is_run(folder):
        raise ConfigError(
            f"output_dir: {folder} has files that are not a run's: name a new or an empty folder"
        )
    if not resume:
        raise ConfigError(f"output_dir: {folder} already has a run: add --resume, or name another folder")


def check_writable(folder: Path) -> None:
    """Raise ConfigError if a run could not write to its folder; leave nothing there."""
    try:
        durable.check_writable(durable.nearest_folder(folder))
    except OSError as error:
        raise _not_writable(folder, error) from error


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the lock of the output folder, which is created; an empty one is removed again.

    Files that a killed run has left staged are removed. Raises CacheError if another process holds the lock,
    and ConfigError if the folder cannot be written.
    """
    with contextlib.ExitStack() as stack:
        try:
            durable.make_folder(folder)
            stack.callback(_remove_if_empty, folder)
            stack.enter_context(locked(str(folder)))
            Folder(folder, create=False).remove_staged()
        except OSError as error:
            raise _not_writable(folder, error) from error
        yield


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()


def write_config(folder: Path, config: TrainConfig) -> None:
    """Write the resolved configuration into the output folder."""
    durable.write(folder / "config.yaml", config.to_yaml())


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


def is_run(folder: Path) -> bool:
    """Return whether a folder has the config.yaml of a training run."""
    try:
        config = yaml.safe_load(Folder(folder, create=False).read("config.yaml", MAX_CONFIG_BYTES) or b"")
    except (OSError, OverflowError, UnicodeDecodeError, yaml.YAMLError):
        return False
    return isinstance(config, dict) and config.keys() >= RUN_KEYS
