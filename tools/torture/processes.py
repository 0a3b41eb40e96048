"""Commands under torture whose engines or ranks are processes of their own: vLLM, Ray, DDP and FSDP2.

They are forks, so that imports are paid for once; a kill of one is a kill of all.
"""

import ctypes
import json
import math
import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

from safetensors.numpy import load

from ddk_build import BuildConfig, build_cache
from ddk_build.capture.cluster import joined_cluster
from tools.torture.subject import Build, Objects
from tools.torture.training import TIMES, Training, without

FORK = multiprocessing.get_context("fork")
PR_SET_PDEATHSIG = 1  # of prctl: the signal that a process gets when its parent dies
TOLERANCE = {"rel_tol": 1e-3, "abs_tol": 1e-4}  # sums over processes are rounded otherwise


class VllmBuild(Build):
    """``ddk-cache build`` with vLLM."""

    hidden_size = 128  # two heads of 64: vLLM takes 32 or more

    def __init__(self, folder: Path) -> None:
        os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        import_module("vllm")
        engine_args = {"enforce_eager": True, "max_num_batched_tokens": 512, "num_gpu_blocks_override": 64}
        super().__init__(folder, {"teacher": {"engine": "vllm", "engine_args": engine_args}})

    def _build(self, config: BuildConfig) -> None:
        run_forked([partial(build_cache, config)])


class RayBuild(Build):
    """``ddk-cache build --ray --num-engines 2`` on a cluster of its own."""

    def _build(self, config: BuildConfig) -> None:
        run_forked([partial(self._build_there, config)])

    def _build_there(self, config: BuildConfig) -> None:
        with joined_cluster(config.teacher, 2) as cluster:
            build_cache(config, cluster)


class Ranks(Training):
    """``torchrun ddk-cache train``.

    ``worlds`` are the numbers of processes, in turn: of a command, and of the one after it.
    """

    def __init__(self, folder: Path, build: Build, worlds: tuple[int, ...], **changes: Any) -> None:
        self._worlds = worlds
        super().__init__(folder, build, **changes)

    def run(self, output: str) -> None:
        """Train, or resume, with as many processes as it is the turn of."""
        with (self.folder / "turns").open("ab") as turns:  # which a killed process leaves to the next
            turns.write(b".")
            world = self._worlds[turns.tell() % len(self._worlds)]
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        run_forked([partial(self._run, output, rank, world, port) for rank in range(world)])

    def _run(self, output: str, rank: int, world: int, port: int) -> None:
        of_torchrun = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in of_torchrun.items()}
        os.environ["MASTER_ADDR"] = "127.0.0.1"
        self.train(output, per_device_train_batch_size=2 // world)

    def comparable(self, objects: Objects) -> Mapping[str, Any]:
        """Compare numbers and weights with a tolerance if the number of processes changes."""
        if len(set(self._worlds)) == 1:
            return super().comparable(objects)
        found: dict[str, Any] = {
            key: [
                without(json.loads(line, parse_float=lambda text: Near(float(text))), TIMES)
                for line in objects[key].splitlines()
            ]
            for key in ("metrics.jsonl", "discrepancy.jsonl")
        }
        weights = load(objects["model.safetensors"])
        return found | {name: [*map(Near, weight.ravel().tolist())] for name, weight in weights.items()}


@dataclass(eq=False)
class Near:
    """A number that equals others within ``TOLERANCE``."""

    value: float

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Near) and math.isclose(self.value, other.value, **TOLERANCE)


def run_forked(functions: Iterable[Callable[[], object]]) -> None:
    """Run functions side by side, each in a process; a kill of one kills this one, and so the others."""
    errors = FORK.SimpleQueue()
    processes = [FORK.Process(target=_run, args=(function, errors)) for function in functions]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode == -signal.SIGKILL for process in processes):
        os.kill(os.getpid(), signal.SIGKILL)
    if not errors.empty():
        raise RuntimeError(errors.get())


def _run(function: Callable[[], object], errors: Any) -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        function()
    except Exception as error:
        errors.put(repr(error))
