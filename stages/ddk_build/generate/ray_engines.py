"""Complete prompts with many engines on a Ray cluster: an actor each, which holds a part of the requests."""

import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any

from ddk_build.capture.cluster import Cluster
from ddk_build.capture.crew import reason_of_loss
from ddk_build.generate.engine import Completion, Request
from ddk_build.generate.vllm_engine import VllmEngine
from ddk_cache.errors import CacheError
from ddk_cache.util.processes import enter_folder

logger = logging.getLogger(__name__)

SECONDS = 0.5  # that an engine works between two calls: then the time of a call is lost in it
Ended = list[tuple[Request, Completion]]


class RemoteEngine:
    """A vLLM engine in an actor's process."""

    def start(self, folder: str, *arguments: Any) -> int:
        """Load the model by the arguments of ``VllmEngine``; return how many requests it should hold.

        ``folder`` is the working directory of the command.
        """
        enter_folder(folder)
        self._engine = VllmEngine(*arguments)
        return self._engine.most

    def advance(self, requests: Sequence[Request]) -> Ended:
        """Take requests, and return completions as :meth:`VllmEngine.advance` does."""
        return self._engine.advance(requests, SECONDS)


class RayEngines:
    """A :class:`ddk_build.generate.engine.Engine` of several; others take the requests of one that dies."""

    def __init__(self, cluster: Cluster, *arguments: Any) -> None:
        """``arguments``: those of ``VllmEngine``."""
        import ray

        actor = ray.remote(RemoteEngine).options(**cluster.resources)
        self._engines = [actor.remote() for _ in range(cluster.num_engines)]
        self._arguments = arguments

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yield completions as they end; see :meth:`ddk_build.generate.engine.Engine.complete`.

        Raises ConfigError if an engine cannot start, and CacheError if vLLM fails in one, or all die.
        """
        import ray

        remaining = iter(requests)
        starting = {engine.start.remote(os.getcwd(), *self._arguments): engine for engine in self._engines}
        most: dict[Any, int] = {}
        held: dict[Any, dict[tuple[Any, ...], Request]] = {}
        calls: dict[Any, Any] = {}
        while True:
            for engine in held.keys() - calls.values():
                new = list(islice(remaining, most[engine] - len(held[engine])))
                held[engine] |= {_key(request): request for request in new}
                if held[engine]:
                    calls[engine.advance.remote(new)] = engine
            if not calls and not starting:
                break
            [call], _ = ray.wait([*starting, *calls])
            is_start = call in starting
            engine = (starting if is_start else calls).pop(call)
            try:
                result = ray.get(call)
            except ray.exceptions.RayError as error:
                logger.warning("an engine is lost: %s", reason_of_loss(error))
                remaining = chain(held.pop(engine, {}).values(), remaining)
                continue
            if is_start:
                most[engine], held[engine] = result, {}
                continue
            for request, _ in result:
                del held[engine][_key(request)]
            yield from result
        if next(remaining, None) is not None:
            raise CacheError("no engine is left; the files that are done stay: run generate again")


def _key(request: Request) -> tuple[Any, ...]:
    return request.shard, request.index, request.sample
