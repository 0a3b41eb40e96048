"""Stage one on many engines: actors on a Ray cluster that take shards from one queue. Nothing else knows Ray.

An engine reads a shard's tokens from the cache and writes its answers there; what goes through Ray are the
shards' names. The process that started the build holds the cache's lock and the queue.
"""

import logging
import os
import socket
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from logging.handlers import BufferingHandler
from typing import Any

from ddk_build.check import checked_teacher, sample
from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.pipeline import Pipeline, Place, tokens_by_domain
from ddk_build.shard_queue import CALIBRATION, DEATHS, Queue
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.layout import Manifest
from ddk_cache.lock import LockedStorage, joined
from ddk_cache.progress import meter
from ddk_cache.records import read_manifest
from ddk_cache.writer import Writer

logger = logging.getLogger(__name__)

OBJECT_STORE = 100 << 20  # bytes; a local cluster's memory for objects, of which there are next to none
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # a worker's death is told here
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it Ray warns of a change to come
    "RAY_worker_niceness": "0",  # engines are no background work; 15 else
}

# What an engine has finished, and the warnings it gave.
Report = tuple[list[Place], list[str]]


class Engine:
    """One engine, in an actor's process. Every method answers with a ``Report``."""

    def __init__(
        self, config: BuildConfig, manifest: Manifest, number: int, folder: str, ticket: str
    ) -> None:
        """``folder``: where the build was started; relative paths mean here what they mean there.

        ``number``: the teacher's, in the manifest.

        ``ticket``: by which the engine may write, until the build gives it up.
        """
        self.config, self.manifest, self.number = config, manifest, number
        self.folder, self.ticket = folder, ticket
        self.warnings = BufferingHandler(capacity=1000)
        logging.getLogger("ddk_build").addHandler(self.warnings)

    def start(self) -> Report:
        """Find the cache, and load the teacher."""
        with suppress(FileNotFoundError):
            os.chdir(self.folder)
        writer = Writer(shared_storage(self.config.cache, self.manifest, self.ticket), self.manifest)
        domain = self.manifest.domains_of(self.number)[0]
        teacher = checked_teacher(
            self.config.teacher_of(domain),
            self.config.target,
            self.config.seq_length,
            sample(writer, domain),
        )
        self.pipeline = Pipeline(writer, teacher, self.number)
        return self._report([])

    def do(self, place: Place) -> Report:
        """Take a shard on, or calibrate."""
        if place == CALIBRATION:
            self.pipeline.calibrate()
            return self._report([place])
        return self._report(self.pipeline.take(place))

    def finish(self) -> Report:
        """Answer what was taken on, and wait for what is being written."""
        return self._report(self.pipeline.finish())

    def _report(self, places: list[Place]) -> Report:
        warnings = [record.getMessage() for record in self.warnings.buffer]
        self.warnings.flush()
        return places, warnings


def shared_storage(url: str, manifest: Manifest, ticket: str) -> LockedStorage:
    """The cache as this machine sees it, to write with the build's ``ticket``.

    Raises
    ------
    ConfigError
        It is not the one that is being built.
    """
    try:
        storage = joined(url, ticket)
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


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process has joined, and its room for engines."""

    engines: int
    resources: Mapping[str, int]
    """What each engine gets: num_cpus and num_gpus."""

    def answer(self, config: BuildConfig, writer: Writer, work: list[Place], number: int) -> None:
        """Let a teacher's engines answer shard after shard; first, one of them what its tables need.

        Raises
        ------
        ConfigError
            An engine cannot start, runs out of memory, or does not see the cache.
        CacheError
            An engine cannot write, or engines die again and again.
        """
        crew = Crew(self, config, writer, number, count=min(self.engines, max(len(work), 1)))
        with closing(crew), meter("teachers", "tokens", parts=tokens_by_domain(writer, work)) as shown:
            if writer.manifest.target.kind != "label" and writer.codebook(number) is None:
                crew.run(Queue([CALIBRATION]), lambda _: None)
            crew.run(Queue(work), lambda place: shown.advance(writer.tokens(place), place[0]))


class Crew:
    """Engines by number, an actor each, with one call under way at most.

    One that dies is replaced, unless that was the DEATHS-th time without a shard between.
    """

    def __init__(
        self, cluster: Cluster, config: BuildConfig, writer: Writer, number: int, count: int
    ) -> None:
        import ray

        kind = ray.remote(Engine).options(**cluster.resources)
        self._create: Callable[[str], Any] = lambda ticket: kind.remote(
            config, writer.manifest, number, os.getcwd(), ticket
        )
        self._lock = writer.holder
        self._actors: dict[int, Any] = {}
        self._tickets: dict[int, str] = {}
        self._calls: dict[Any, int] = {}
        self._deaths: Counter[int] = Counter()
        for engine in range(count):
            self._start(engine)

    def run(self, queue: Queue, finished: Callable[[Place], None]) -> None:
        """Let the engines do what is in the queue; ``finished`` hears of every shard that is written."""
        import ray

        while not queue.is_done():
            for engine in self._actors.keys() - self._calls.values():
                place = queue.take(engine)
                if place is not None:
                    self._calls[self._actors[engine].do.remote(place)] = engine
                elif queue.holds(engine):
                    self._calls[self._actors[engine].finish.remote()] = engine
            [call], _ = ray.wait(list(self._calls))
            engine = self._calls.pop(call)
            try:
                places, warnings = ray.get(call)
            except ray.exceptions.RayError as error:
                reason = "its process or machine died, of too little memory perhaps"
                if isinstance(error, ray.exceptions.RayTaskError):
                    if isinstance(error.cause, ConfigError | CacheError):
                        raise error.cause from error
                    reason = " ".join(f"{type(error.cause).__name__}: {error.cause}".split())
                self._lock.dismiss(self._tickets.pop(engine))  # it may still live, and write
                queue.give_back(engine, reason)
                self._replace(engine, reason)
                continue
            for warning in warnings:
                logger.warning("engine %d: %s", engine, warning)
            queue.finish(engine, places)
            for place in places:
                self._deaths[engine] = 0
                finished(place)

    def close(self) -> None:
        """End all engines at once; Ray lets one that is still loading its teacher come to the end of that."""
        import ray

        for actor in self._actors.values():
            ray.kill(actor)

    def _start(self, engine: int) -> None:
        self._tickets[engine] = self._lock.admit()
        self._actors[engine] = self._create(self._tickets[engine])
        self._calls[self._actors[engine].start.remote()] = engine

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
    address = os.environ.get("RAY_ADDRESS") or "local"
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
    except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        raise ConfigError(f"RAY_ADDRESS: {address}: {' '.join(str(error).split())}") from error
    try:
        nodes = ray.nodes()  # type: ignore[no-untyped-call]
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
