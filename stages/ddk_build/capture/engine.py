"""One engine of a Ray cluster: it reads a shard's tokens from the cache and writes its answers there."""

import logging
import socket
from collections.abc import Sequence
from logging.handlers import BufferingHandler

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.check import checked_teacher
from ddk_build.capture.pipeline import Pipeline
from ddk_build.capture.shard_queue import CALIBRATION
from ddk_build.config import BuildConfig
from ddk_cache.cache.metadata import read_manifest
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import Manifest, ShardKey
from ddk_cache.storage.lock import LockedStorage, joined
from ddk_cache.util.processes import enter_folder

Report = tuple[list[ShardKey], list[str]]
"""The shards that an engine has finished, and the warnings it logged."""


class Engine:
    """An engine in an actor's process. Every method returns a ``Report``."""

    def __init__(self, config: BuildConfig, manifest: Manifest, teacher_index: int, write_token: str) -> None:
        """Keep the arguments; the build may revoke ``write_token``."""
        self.config, self.manifest, self.teacher_index = config, manifest, teacher_index
        self.write_token = write_token
        self.warnings = BufferingHandler(capacity=1000)
        logging.getLogger("ddk_build").addHandler(self.warnings)

    def start(self, folder: str, documents: Sequence[NDArray[np.int32]]) -> Report:
        """Open the cache, then load the teacher and check it on ``documents``.

        ``folder`` is the build's working directory.
        """
        enter_folder(folder)
        storage = shared_storage(self.config.cache, self.manifest, self.write_token)
        domain = self.manifest.domains_of(self.teacher_index)[0]
        teacher = checked_teacher(
            self.config.teacher_of(domain), self.config.target, self.config.teacher_length, documents
        )
        self.pipeline = Pipeline(Writer(storage, self.manifest), teacher, self.teacher_index)
        return self._report([])

    def do(self, shard: ShardKey) -> Report:
        """Take a shard, or calibrate."""
        if shard == CALIBRATION:
            self.pipeline.calibrate()
            return self._report([shard])
        return self._report(self.pipeline.take(shard))

    def finish(self) -> Report:
        """Answer the shards that were taken, and wait until they are written."""
        return self._report(self.pipeline.finish())

    def _report(self, shards: list[ShardKey]) -> Report:
        warnings = [record.getMessage() for record in self.warnings.buffer]
        self.warnings.flush()
        return shards, warnings


def shared_storage(url: str, manifest: Manifest, write_token: str) -> LockedStorage:
    """Return the cache as this machine sees it, writable with the build's ``write_token``.

    Raises ConfigError if this machine does not see the cache that is being built.
    """
    try:
        storage = joined(url, write_token)
        existing = read_manifest(storage)
    except CacheError as error:
        problem = str(error)
    else:
        if existing == manifest:
            return storage
        problem = f"{url}: another cache, or no cache"
    raise ConfigError(
        f"cache: {socket.gethostname()} does not see the cache that is being built ({problem}); with engines "
        "on several machines it must be an object store or a folder that all of them see"
    )
