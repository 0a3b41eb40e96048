"""An engine of many: it takes a shard's tokens from the cache, and writes its answers there."""

import logging
import os
import socket
from contextlib import suppress
from logging.handlers import BufferingHandler

from ddk_build.check import checked_teacher, sample
from ddk_build.config import BuildConfig
from ddk_build.pipeline import Pipeline, ShardKey
from ddk_build.shard_queue import CALIBRATION
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.layout import Manifest
from ddk_cache.lock import LockedStorage, joined
from ddk_cache.metadata import read_manifest
from ddk_cache.writer import Writer

# What an engine has finished, and the warnings it gave.
Report = tuple[list[ShardKey], list[str]]


class Engine:
    """One engine, in an actor's process. Every method answers with a ``Report``."""

    def __init__(
        self, config: BuildConfig, manifest: Manifest, number: int, folder: str, write_token: str
    ) -> None:
        """``folder``: where the build was started; relative paths mean here what they mean there.

        ``number``: the teacher's, in the manifest.

        ``write_token``: by which the engine may write, until the build gives it up.
        """
        self.config, self.manifest, self.number = config, manifest, number
        self.folder, self.write_token = folder, write_token
        self.warnings = BufferingHandler(capacity=1000)
        logging.getLogger("ddk_build").addHandler(self.warnings)

    def start(self) -> Report:
        """Find the cache, and load the teacher."""
        with suppress(FileNotFoundError):
            os.chdir(self.folder)
        storage = shared_storage(self.config.cache, self.manifest, self.write_token)
        domain = self.manifest.domains_of(self.number)[0]
        teacher = checked_teacher(
            self.config.teacher_of(domain),
            self.config.target,
            self.config.seq_length,
            sample(Writer(storage, self.manifest), domain),
        )
        # Another writer: it reads how many rows there are when they have been tokenised.
        self.pipeline = Pipeline(Writer(storage, self.manifest), teacher, self.number)
        return self._report([])

    def do(self, place: ShardKey) -> Report:
        """Take a shard on, or calibrate."""
        if place == CALIBRATION:
            self.pipeline.calibrate()
            return self._report([place])
        return self._report(self.pipeline.take(place))

    def finish(self) -> Report:
        """Answer what was taken on, and wait for what is being written."""
        return self._report(self.pipeline.finish())

    def _report(self, places: list[ShardKey]) -> Report:
        warnings = [record.getMessage() for record in self.warnings.buffer]
        self.warnings.flush()
        return places, warnings


def shared_storage(url: str, manifest: Manifest, write_token: str) -> LockedStorage:
    """The cache as this machine sees it, to write with the build's ``write_token``.

    Raises
    ------
    ConfigError
        It is not the one that is being built.
    """
    try:
        storage = joined(url, write_token)
        there = read_manifest(storage)
    except CacheError as error:
        problem = str(error)
    else:
        if there == manifest:
            return storage
        problem = f"{url}: another cache, or none"
    raise ConfigError(
        f"cache: {socket.gethostname()} does not see the cache that is being built ({problem}); with engines "
        "on several machines it must be an object store or a folder that all of them see"
    )
