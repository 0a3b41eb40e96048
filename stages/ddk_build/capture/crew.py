"""The engines of one teacher on a Ray cluster, the shards they hold, and their replacement when they die."""

import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.engine import Engine
from ddk_build.capture.pipeline import needs_codebook
from ddk_build.capture.shard_queue import CALIBRATION, MOST_DEATHS, Queue
from ddk_build.config import BuildConfig
from ddk_build.teacher.engines import EngineDiedError
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.format.layout import ShardKey

logger = logging.getLogger(__name__)


class Crew:
    """The engines of one teacher: an actor each, with at most one call at a time.

    Engine 0 starts at once, the others in ``assign``. A dead engine is replaced until it has died MOST_DEATHS
    times without finishing a shard.
    """

    def __init__(
        self,
        resources: Mapping[str, int],
        config: BuildConfig,
        writer: Writer,
        teacher_index: int,
        documents: Sequence[NDArray[np.int32]],
    ) -> None:
        """``resources``: num_cpus and num_gpus of each engine."""
        import ray

        self._actor = ray.remote(Engine).options(**resources)
        self._config, self._writer, self._teacher_index = config, writer, teacher_index
        self._documents = documents
        self._queues = [Queue([])]
        self._actors: dict[int, Any] = {}
        self._write_tokens: dict[int, str] = {}
        self.calls: dict[Any, int] = {}
        """The engine that works on each call."""
        self._deaths: Counter[int] = Counter()
        self._start(0)

    def wait(self) -> None:
        """Wait until the first engine, or its replacement, has started."""
        import ray

        while self.calls:
            [call], _ = ray.wait(list(self.calls))
            self.collect(call)

    def assign(self, shards: list[ShardKey], num_engines: int) -> None:
        """Queue shards, calibration first if needed, and start the other engines, at most one a shard."""
        self._queues = [Queue(shards)]
        if needs_codebook(self._writer, self._teacher_index):
            self._queues.insert(0, Queue([CALIBRATION]))
        for engine in range(1, min(num_engines, len(shards))):
            self._start(engine)

    def is_done(self) -> bool:
        """Return whether all shards are written."""
        while self._queues and self._queues[0].is_done():
            del self._queues[0]
        return not self._queues

    def hand_out(self) -> None:
        """Give each idle engine its next shard, or let it finish the shards it holds."""
        queue = self._queues[0]
        for engine in self._actors.keys() - self.calls.values():
            shard = queue.take(engine)
            if shard is not None:
                self.calls[self._actors[engine].do.remote(shard)] = engine
            elif queue.holds(engine):
                self.calls[self._actors[engine].finish.remote()] = engine

    def collect(self, call: Any) -> list[ShardKey]:
        """Return the shards that a finished call has written; replace the engine if it died."""
        import ray

        engine, queue = self.calls.pop(call), self._queues[0]
        try:
            shards, warnings = ray.get(call)
        except ray.exceptions.RayError as error:
            reason = reason_of_loss(error)
            self._writer.holder.revoke(self._write_tokens.pop(engine))  # it may still live, and write
            queue.give_back(engine, reason)
            self._replace(engine, reason)
            return []
        for warning in warnings:
            logger.warning("engine %d: %s", engine, warning)
        queue.finish(engine, shards)
        if shards:
            self._deaths[engine] = 0
        return [shard for shard in shards if shard != CALIBRATION]

    def close(self) -> None:
        """Kill all engines; Ray waits for an engine that is loading its teacher."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def _start(self, engine: int) -> None:
        write_token = self._write_tokens[engine] = self._writer.holder.grant()
        actor = self._actor.remote(self._config, self._writer.manifest, self._teacher_index, write_token)
        self._actors[engine] = actor
        self.calls[actor.start.remote(os.getcwd(), self._documents)] = engine

    def _replace(self, engine: int, reason: str) -> None:
        """Start another actor instead of one that died or failed."""
        import ray

        logger.warning("engine %d is lost: %s", engine, reason)
        ray.kill(self._actors.pop(engine))
        self._deaths[engine] += 1
        if self._deaths[engine] < MOST_DEATHS:
            self._start(engine)
        elif not self._actors:
            raise CacheError(f"no engine is left; the last one was lost: {reason}")


def reason_of_loss(error: Any) -> str:
    """Return why an engine is lost; raise the error itself where all engines would have it."""
    import ray

    if not isinstance(error, ray.exceptions.RayTaskError):
        return "its process or machine died, perhaps because it ran out of memory"
    if isinstance(error.cause, ConfigError | CacheError) and not isinstance(error.cause, EngineDiedError):
        raise error.cause from error
    return " ".join(f"{type(error.cause).__name__}: {error.cause}".split())
