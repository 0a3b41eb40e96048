"""Capture on many engines: Ray actors that take shards from one queue.

An engine reads a shard's tokens from the cache and writes its answers there, so only shard keys go through
Ray. The process that started the build holds the cache's lock and the queue.
"""

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import chain, islice

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.crew import Crew
from ddk_build.capture.pipeline import tokens_by_domain
from ddk_build.config import BuildConfig, TeacherConfig
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import ShardKey
from ddk_cache.util.progress import Meter, meter

Capture = Callable[[Mapping[int, list[ShardKey]]], None]
"""Capture the shards of each teacher index."""

OBJECT_STORE = 100 << 20  # bytes of a local cluster's memory for objects; nearly unused
SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DEDUP_LOGS_SKIP_REGEX": ".",  # the build reports a worker's death itself
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # without it Ray warns about a future change
    "RAY_worker_niceness": "0",  # engines are not background work; Ray's default is 15
}


@dataclass(frozen=True)
class Cluster:
    """A Ray cluster that this process has joined, and the engines to start there."""

    num_engines: int
    resources: Mapping[str, int]
    """num_cpus and num_gpus of each engine."""

    @contextmanager
    def engines(
        self, writer: Writer, config: BuildConfig, documents: Mapping[int, Sequence[NDArray[np.int32]]]
    ) -> Iterator[Capture]:
        """Start and check one engine for each of the first teachers; yield the function that captures.

        Teachers work side by side if there are enough engines; the others follow when the first are done.

        ``documents`` has token ids to check each teacher that may have work with, by teacher index.

        Raises ConfigError if an engine cannot start, runs out of memory, or does not see the cache, and
        CacheError if an engine cannot write, or engines die repeatedly.
        """
        with ExitStack() as stack:

            def start(teacher_index: int) -> Crew:
                crew = Crew(self.resources, config, writer, teacher_index, documents[teacher_index])
                return stack.enter_context(closing(crew))

            started = {index: start(index) for index in islice(documents, self.num_engines)}
            for crew in started.values():
                crew.wait()

            def capture(work: Mapping[int, list[ShardKey]]) -> None:
                for index in started.keys() - work.keys():
                    started.pop(index).close()
                shards = list(chain.from_iterable(work.values()))
                with meter("teachers", "tokens", parts=tokens_by_domain(writer, shards)) as progress:
                    indices = iter(work)
                    while group := list(islice(indices, self.num_engines)):
                        crews = {
                            (started.pop if index in started else start)(index): work[index]
                            for index in group
                        }
                        self._answer(writer, crews, progress)

            yield capture

    def _answer(self, writer: Writer, work: Mapping[Crew, list[ShardKey]], progress: Meter) -> None:
        """Distribute the engines among the crews, and hand out shards until all are written."""
        import ray

        tokens = [sum(map(writer.tokens, shards)) for shards in work.values()]
        for (crew, shards), count in zip(work.items(), distribute(tokens, self.num_engines), strict=True):
            crew.assign(shards, count)
        while busy := [crew for crew in work if not crew.is_done()]:
            for crew in busy:
                crew.hand_out()
            [call], _ = ray.wait([call for crew in busy for call in crew.calls])
            crew = next(crew for crew in busy if call in crew.calls)
            for shard in crew.collect(call):
                progress.advance(writer.tokens(shard), shard[0])
            if crew.is_done():
                crew.close()  # another crew may wait for its memory


def distribute(tokens: Sequence[int], num_engines: int) -> list[int]:
    """Return how many engines each teacher gets: one, and the rest in proportion to its tokens."""
    counts = [1] * len(tokens)
    for _ in range(num_engines - len(counts)):
        counts[int(np.argmax(np.divide(tokens, counts)))] += 1
    return counts


@contextmanager
def joined_cluster(teacher: TeacherConfig, num_engines: int | None) -> Iterator[Cluster]:
    """Join the cluster that RAY_ADDRESS names, or start one on this machine until the build ends.

    Raises ConfigError if Ray is not installed, or the cluster cannot be reached or has no room for the
    engines.
    """
    for name, value in SETTINGS.items():
        os.environ.setdefault(name, value)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigError("--ray: Ray is not installed; pip install 'ddk-cache[ray]'") from error
    address = os.environ.get("RAY_ADDRESS") or "local"
    local = {"include_dashboard": False, "object_store_memory": OBJECT_STORE} if address == "local" else {}
    try:
        host, colon, port = address.removeprefix("ray://").rpartition(":")
        if colon:
            # Ray itself retries for ten minutes.
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except Exception as error:  # also a plain Exception, if a busy machine is slow to start its cluster
        raise ConfigError(f"RAY_ADDRESS: {address}: {' '.join(str(error).split())}") from error
    try:
        machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        yield allot(machines, gpus_per_engine(teacher), num_engines)
    finally:
        ray.shutdown()


def gpus_per_engine(teacher: TeacherConfig) -> int:
    """Return the GPUs of one engine: vLLM's tensor parallel size times its pipeline parallel size.

    Raises ConfigError if one of the sizes is not a positive integer.
    """
    count = 1
    for key in ("tensor_parallel_size", "pipeline_parallel_size"):
        size = teacher.engine_args.get(key, 1)
        if not isinstance(size, int) or size < 1:
            raise ConfigError(f"teacher.engine_args.{key}: must be a whole number above 0, not {size!r}")
        count *= size
    return count


def allot(machines: Sequence[Mapping[str, float]], gpus_per_engine: int, num_engines: int | None) -> Cluster:
    """Return how many engines to start, and the resources of each.

    Parameters
    ----------
    machines
        Each machine's resources, as Ray reports them ("CPU", "GPU").
    gpus_per_engine
        GPUs that an engine needs, all on one machine.
    num_engines
        How many engines to start; None for as many as the GPUs allow, one without GPUs.

    Raises
    ------
    ConfigError
        The cluster has no room for them.
    """
    gpus = [int(machine.get("GPU", 0)) for machine in machines]
    cpus = [int(machine.get("CPU", 0)) for machine in machines]
    if any(gpus):
        room = sum(count // gpus_per_engine for count in gpus)
        if room < (num_engines or 1):
            raise ConfigError(
                f"--num-engines: the cluster has GPUs for {room}, at {gpus_per_engine} for each on one "
                "machine (engine_args: tensor_parallel_size x pipeline_parallel_size)"
            )
        return Cluster(num_engines or room, {"num_cpus": 1, "num_gpus": gpus_per_engine})
    count = num_engines or 1
    fitting = [share for share in range(1, max(cpus) + 1) if sum(total // share for total in cpus) >= count]
    if not fitting:
        raise ConfigError(f"--num-engines: the cluster has {sum(cpus)} CPUs; an engine needs at least one")
    return Cluster(count, {"num_cpus": fitting[-1]})
