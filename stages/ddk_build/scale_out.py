"""Stage one on many engines: actors on a Ray cluster that take shards from one queue.

An engine reads a shard's tokens from the cache and writes its answers there; what goes through Ray are the
shards' names. The process that started the build holds the cache's lock and the queue.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.engine import Engine
from ddk_build.pipeline import ShardKey, needs_codebook, tokens_by_domain
from ddk_build.ray_tasks import address_of_cluster, ray_tasks
from ddk_build.shard_queue import CALIBRATION, DEATHS, Queue
from ddk_build.tokenisers import Helpers
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.progress import Meter, meter
from ddk_cache.writer import Writer

logger = logging.getLogger(__name__)

Whose = TypeVar("Whose")  # a teacher's number or its crew

OBJECT_STORE = 100 << 20  # bytes; a local cluster's memory for objects, of which there are next to none
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # a worker's death is told here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it Ray warns of a change to come
    "RAY_worker_niceness": "0",  # engines are no background work; 15 else
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process has joined, and its room for engines."""

    engines: int
    resources: Mapping[str, int]
    """What each engine gets: num_cpus and num_gpus."""

    @property
    def tokenisers(self) -> Helpers:
        """Its cores, for this process or another one of this machine."""
        return partial(ray_tasks, address_of_cluster())

    def answer(
        self,
        config: BuildConfig,
        writer: Writer,
        numbers: Sequence[int],
        all_work: Callable[[], Mapping[int, list[ShardKey]]],
    ) -> None:
        """Let each teacher's engines answer its shards; first, one of them what its tables need.

        Teachers work side by side, as many as there are engines for; then the next ones. One engine of each
        of the first has started before ``all_work`` is asked for, which tokenises: if it cannot, that is told
        before.

        Parameters
        ----------
        numbers
            Of the teachers who may have work.
        all_work
            The shards of those who have some.

        Raises
        ------
        ConfigError
            An engine cannot start, runs out of memory, or does not see the cache.
        CacheError
            An engine cannot write, or engines die again and again.
        """
        with ExitStack() as stack:
            started = {}
            for number in numbers[: self.engines]:
                started[number] = Crew(self, config, writer, number)
                stack.callback(started[number].close)
            for crew in started.values():
                crew.wait()
            works = all_work()
            for number in started.keys() - works.keys():
                started.pop(number).close()
            shards = list(chain.from_iterable(works.values()))
            with meter("teachers", "tokens", parts=tokens_by_domain(writer, shards)) as shown:
                for start in range(0, len(works), self.engines):
                    group = list(works)[start : start + self.engines]
                    crews = [started.get(number) or Crew(self, config, writer, number) for number in group]
                    self._answer(writer, {crew: works[crew.number] for crew in crews}, shown)

    def _answer(self, writer: Writer, works: Mapping["Crew", list[ShardKey]], shown: Meter) -> None:
        import ray

        tokens = {crew: sum(map(writer.tokens, work)) for crew, work in works.items()}
        with ExitStack() as stack:
            crews = [stack.enter_context(closing(crew)) for crew in works]
            for crew, count in teams(tokens, self.engines).items():
                crew.take_on(works[crew], count)
            while at_work := [crew for crew in crews if not crew.is_done()]:
                for crew in at_work:
                    crew.hand_out()
                [call], _ = ray.wait([call for crew in at_work for call in crew.calls])
                crew = next(crew for crew in at_work if call in crew.calls)
                for place in crew.take_back(call):
                    shown.advance(writer.tokens(place), place[0])
                if crew.is_done():
                    crew.close()  # others may wait for its memory


def teams(tokens: Mapping[Whose, int], engines: int) -> dict[Whose, int]:
    """How many of at least as many engines each teacher gets: one, and more by its tokens."""
    found = dict.fromkeys(tokens, 1)
    for _ in range(engines - len(found)):
        found[max(found, key=lambda whose: tokens[whose] / found[whose])] += 1
    return found


class Crew:
    """A teacher's engines by number, an actor each, with one call under way at most; one starts at once.

    One that dies is replaced, unless that was the DEATHS-th time without a shard between.
    """

    def __init__(self, cluster: Cluster, config: BuildConfig, writer: Writer, number: int) -> None:
        import ray

        self.number = number
        self._writer = writer

        kind = ray.remote(Engine).options(**cluster.resources)
        self._create: Callable[[str], Any] = lambda write_token: kind.remote(
            config, writer.manifest, number, os.getcwd(), write_token
        )
        self._lock = writer.holder
        self._queues = [Queue([])]
        self._actors: dict[int, Any] = {}
        self._write_tokens: dict[int, str] = {}
        self.calls: dict[Any, int] = {}
        self._deaths: Counter[int] = Counter()
        self._start(0)

    def wait(self) -> None:
        """Until the engine that starts has started, or another in its place."""
        import ray

        while self.calls:
            [call], _ = ray.wait(list(self.calls))
            self.take_back(call)

    def take_on(self, work: list[ShardKey], count: int) -> None:
        """Have shards to hand out, to ``count`` engines if there are as many shards."""
        self._queues = [Queue(work)]
        if needs_codebook(self._writer, self.number):
            self._queues.insert(0, Queue([CALIBRATION]))
        for engine in range(1, min(count, len(work))):
            self._start(engine)

    def is_done(self) -> bool:
        """Whether all is written."""
        while self._queues and self._queues[0].is_done():
            del self._queues[0]
        return not self._queues

    def hand_out(self) -> None:
        """Give those who wait what is to be done."""
        queue = self._queues[0]
        for engine in self._actors.keys() - self.calls.values():
            place = queue.take(engine)
            if place is not None:
                self.calls[self._actors[engine].do.remote(place)] = engine
            elif queue.holds(engine):
                self.calls[self._actors[engine].finish.remote()] = engine

    def take_back(self, call: Any) -> list[ShardKey]:
        """The shards that are written when a call has ended; an engine that died of it is replaced."""
        import ray

        engine, queue = self.calls.pop(call), self._queues[0]
        try:
            places, warnings = ray.get(call)
        except ray.exceptions.RayError as error:
            reason = "its process or machine died, of too little memory perhaps"
            if isinstance(error, ray.exceptions.RayTaskError):
                if isinstance(error.cause, ConfigError | CacheError):
                    raise error.cause from error
                reason = " ".join(f"{type(error.cause).__name__}: {error.cause}".split())
            self._lock.revoke(self._write_tokens.pop(engine))  # it may still live, and write
            queue.give_back(engine, reason)
            self._replace(engine, reason)
            return []
        for warning in warnings:
            logger.warning("engine %d: %s", engine, warning)
        queue.finish(engine, places)
        if places:
            self._deaths[engine] = 0
        return [place for place in places if place != CALIBRATION]

    def close(self) -> None:
        """End all engines at once; Ray lets one that is still loading its teacher come to the end of that."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def _start(self, engine: int) -> None:
        self._write_tokens[engine] = self._lock.grant()
        self._actors[engine] = self._create(self._write_tokens[engine])
        self.calls[self._actors[engine].start.remote()] = engine

    def _replace(self, engine: int, reason: str) -> None:
        """Put another actor in the place of one that died or failed."""
        import ray

        logger.warning("engine %d is lost: %s", engine, reason)
        ray.kill(self._actors.pop(engine))
        self._deaths[engine] += 1
        if self._deaths[engine] < DEATHS:
            self._start(engine)
        elif not self._actors:
            raise CacheError(f"no engine is left; the last one was lost thus: {reason}")


@contextmanager
def joined_cluster(teacher: TeacherConfig, engines: int | None) -> Iterator[Cluster]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine for as long as the build takes.

    Raises
    ------
    ConfigError
        Ray is not installed, the cluster cannot be reached, or has no room for the engines.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("--ray: Ray is not installed; pip install 'ddk-cache[ray]'") from error
    address = address_of_cluster()
    local: dict[str, Any] = {"include_dashboard": False, "object_store_memory": OBJECT_STORE}
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:
            # Ray itself tries for ten minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(
            address,
            log_to_driver=False,
            logging_level=logging.ERROR,
            **(local if address == "local" else {}),
        )
    except Exception as error:  # a plain one where a machine is too busy to start its own cluster
        raise ConfigError(f"RAY_ADDRESS: {address}: {' '.join(str(error).split())}") from error
    try:
        nodes = ray.nodes()
        machines = [node["Resources"] for node in nodes if node["Alive"]]
        yield allot(machines, devices(teacher), engines)
    finally:
        ray.shutdown()


def devices(teacher: TeacherConfig) -> int:
    """GPUs of one engine: vLLM's tensor times pipeline parallel size.

    Raises
    ------
    ConfigError
        One of them is no number.
    """
    count = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = teacher.engine_args.get(key, 1)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"teacher.engine_args.{key}: must be a whole number above 0, not {size!r}")
        count *= size
    return count


def allot(machines: Sequence[Mapping[str, float]], devices: int, engines: int | None) -> Cluster:
    """How many engines there will be and what each gets.

    Parameters
    ----------
    machines
        Each machine's resources, as Ray has them ("CPU", "GPU").
    devices
        GPUs that an engine needs, all on one machine.
    engines
        How many are wanted; None for as many as the GPUs allow, one without GPUs.

    Raises
    ------
    ConfigError
        There is no room for them.
    """
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    if any(gpus):
        room = sum(count // devices for count in gpus)
        if room < (engines or 1):
            raise ConfigError(
                f"--num-engines: the cluster has GPUs for {room}, at {devices} for each on one machine "
                "(teacher.engine_args: tensor_parallel_size x pipeline_parallel_size)"
            )
        return Cluster(engines or room, {"num_cpus": 1, "num_gpus": devices})
    wanted = engines or 1
    fitting = [share for share in range(1, max(cpus) + 1) if sum(count // share for count in cpus) >= wanted]
    if not fitting:
        raise ConfigError(f"--num-engines: the cluster has {sum(cpus)} CPUs, an engine needs at least one")
    return Cluster(wanted, {"num_cpus": fitting[-1]})
