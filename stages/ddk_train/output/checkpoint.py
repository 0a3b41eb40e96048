"""Checkpoints: the state of a run on disk, from which it resumes to the bit.

``checkpoint-<step>/`` holds ``state.json``, ``SHA256SUMS`` and, written by torch.distributed.checkpoint as
safetensors, the trained weights, optimizer states, sums since the last line of metrics and random states.
Each process writes a part, under FSDP2 its shards; any number of processes can resume, sharded or not. Frozen
weights come from the student's source.
"""

import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field, NonNegativeInt
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from ddk_cache.errors import brief
from ddk_cache.sampler import SamplerState
from ddk_cache.util import durable
from ddk_train.errors import TrainingError, writing
from ddk_train.output.sums import write_sums
from ddk_train.student.distributed import Ranks


@dataclass
class Progress:
    """The progress of a run; [N] in the order of the cache's domains, which the fingerprint has."""

    sampler: SamplerState  # at the start of the current interval
    run_id: Annotated[str, Field(pattern="^[0-9a-f]{32}$")]  # for trackers
    step: NonNegativeInt = 0  # optimizer steps done
    interval: NonNegativeInt = 0
    start: NonNegativeInt = 0  # the step at which the current interval began
    factor: list[Annotated[float, Field(ge=0, le=1)]] = field(default_factory=list)  # of the interval, [N]
    tokens: NonNegativeInt = 0  # trained on by all processes


def checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first; their files may be damaged."""
    paths = (path for path in folder.glob("checkpoint-*") if not path.is_symlink() and path.is_dir())
    return sorted(filter(step_of, paths), key=step_of)


def step_of(path: Path) -> int:
    """Return the step of ``checkpoint-<step>``, or 0 for another name."""
    match = re.fullmatch(r"checkpoint-([1-9][0-9]{0,14})", path.name)
    return int(match[1]) if match else 0


class _DigestingFiles(FileSystem):
    """The local file system; it records the sha256 of the bytes that are written to each file."""

    def __init__(self) -> None:
        self.digests: dict[str, str] = {}

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[Any]:
        """Open a file to write it from the beginning to the end."""
        with super().create_stream(path, mode) as stream:
            digested = _DigestingStream(stream)
            yield digested
        self.digests[Path(path).name] = digested.digest.hexdigest()


class _DigestingStream:
    """A file that is written; hashes beside the writing, which takes about as long."""

    def __init__(self, stream: Any) -> None:
        self._stream, self.digest = stream, hashlib.sha256()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, data: bytes) -> int:
        """Write and hash ``data``."""
        with ThreadPoolExecutor(1) as pool:
            hashed = pool.submit(self.digest.update, data)
            written: int = self._stream.write(data)
            hashed.result()
        return written


@dataclass
class CheckpointWriter:
    """Writes the checkpoints of a run. Methods are collective."""

    folder: Path
    student: nn.Module
    optimizer: Optimizer
    ranks: Ranks
    keep: int  # the number of newest checkpoints
    in_background: bool  # write from a copy in the machine's memory while training continues
    step: int = 0  # of the newest checkpoint
    _pending: "Future[None] | None" = None
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1, "checkpoint"))

    def save(self, step: int, state: Mapping[str, Any], window: Tensor) -> None:
        """Write ``checkpoint-<step>`` under a temporary name, rename it, and remove old ones.

        ``state`` is JSON: ``progress``, ``fingerprint`` and ``files`` (``Records.state``). The digests are of
        the bytes that were meant, not of the ones that a disk returns.
        """
        self._write(f"checkpoint-{step}", state, self._tensors(window), in_background=self.in_background)
        self.step = step

    def save_best(self, step: int, loss: float) -> None:
        """Write the trained weights of the best measurement so far to ``best-<step>``."""
        weights = {f"weight/{name}": weight.detach() for name, weight in trained(self.student)}
        self._write(f"best-{step}", {"step": step, "loss": loss}, weights, in_background=False)

    def _write(
        self, name: str, state: Mapping[str, Any], tensors: dict[str, Tensor], *, in_background: bool
    ) -> None:
        self.wait()
        ranks = self.ranks
        final, partial = self.folder / name, self.folder / f"partial-{name}"
        if ranks.is_main:
            remove(partial)
            partial.mkdir(parents=True)
        ranks.barrier()
        writer, files = HuggingFaceStorageWriter(str(partial), save_distributed=True), _DigestingFiles()
        writer.fs = files
        options: dict[str, Any] = {
            "storage_writer": writer,
            "process_group": ranks.on_cpu,
            "no_dist": ranks.world == 1,
        }

        def finish(write_tensors: Callable[[], object]) -> None:
            with writing(partial):
                write_tensors()
            digests = [files.digests]
            if ranks.world > 1:
                digests *= ranks.world
                distributed.gather_object(
                    files.digests, digests if ranks.is_main else None, group=ranks.on_cpu
                )
            if ranks.is_main:
                with writing(partial):
                    self._complete(partial, final, json.dumps(state).encode(), digests)

        if in_background:
            written: Any = state_dict_saver.async_save(tensors, **options)  # returns once it has the copy
            self._pending = self._thread.submit(finish, written.result)
        else:
            finish(lambda: state_dict_saver.save(tensors, **options))

    def _complete(
        self, partial: Path, final: Path, state: bytes, digests: Sequence[Mapping[str, str]]
    ) -> None:
        """Add state and digests to a checkpoint, and give it its name."""
        durable.write(partial / "state.json", state)
        written = {name: digest for part in digests for name, digest in part.items()}
        write_sums(partial, written | {"state.json": hashlib.sha256(state).hexdigest()})
        remove(final)
        partial.rename(final)
        durable.sync(self.folder)
        if final.name.startswith("best-"):
            for path in set(self.folder.glob("best-*")) - {final}:
                remove(path)
        remove_old(self.folder, self.keep)

    def wait(self) -> None:
        """Wait until the newest checkpoint is complete, and raise an error in writing it."""
        if self._pending is not None:
            self._pending.result()
            self._pending = None

    def _tensors(self, window: Tensor) -> dict[str, Tensor]:
        """Return the tensors of a checkpoint by unique names."""
        rank, device = self.ranks.rank, self.ranks.device
        tensors = {f"window/{rank}": window, f"random/cpu/{rank}": torch.get_rng_state()}
        if device.type == "cuda":
            tensors[f"random/cuda/{rank}"] = torch.cuda.get_rng_state(device)
        for name, parameter in trained(self.student):
            tensors[f"weight/{name}"] = parameter.detach()
            for kind, value in self.optimizer.state[parameter].items():
                # safetensors refuses tensors that share memory, as an 8-bit optimizer's small tables do.
                is_shared = isinstance(value, Tensor) and value.shape != parameter.shape
                tensors[f"optimizer/{kind}/{name}"] = value.clone() if is_shared else torch.as_tensor(value)
        return tensors


def trained(student: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the weights that are trained, by name."""
    return (item for item in student.named_parameters() if item[1].requires_grad)


def remove_old(folder: Path, limit: int) -> None:
    """Remove incomplete checkpoints, and complete ones but the newest ``limit``."""
    partial = [path for name in ("checkpoint", "best") for path in folder.glob(f"partial-{name}-*")]
    for path in [*partial, *checkpoints(folder)[:-limit]]:
        remove(path if path.name.startswith("partial-") else path.rename(folder / f"partial-{path.name}"))


def set_aside(folder: Path, step: int) -> None:
    """Rename the damaged checkpoints after ``step`` to ``damaged-checkpoint-<step>``."""
    for path in checkpoints(folder):
        if step_of(path) > step:
            remove(folder / f"damaged-{path.name}")
            path.rename(folder / f"damaged-{path.name}")


def load(path: Path, student: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Tensor:
    """Restore weights, optimizer states and random states from a checkpoint; return the window's sums.

    With as many processes as wrote it, a run resumes to the bit. Otherwise the main process gets the sums of
    all windows, and an added process keeps its random state, as a GPU does after a CPU. Raises TrainingError
    if the tensors are not this run's.
    """
    try:
        return _load(path, student, optimizer, ranks)
    except (AssertionError, CheckpointException, KeyError, OSError, RuntimeError, ValueError) as error:
        raise TrainingError(f"{path}: its tensors do not fit this run: {brief(error)}") from error


def _load(path: Path, student: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Tensor:
    reader = HuggingFaceStorageReader(str(path))
    names = {parameter: name for name, parameter in student.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    tensors: dict[str, Tensor] = {
        f"weight/{names[parameter]}": parameter.detach() for parameter in parameters
    }
    stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key, description in stored.items():
        kind, _, name = key.rpartition("/")
        if key in tensors or (kind.startswith("random/") and name != str(ranks.rank)):
            continue
        weight, size = tensors.get(f"weight/{name}"), description.size
        like = weight if weight is not None and weight.shape == size else torch.empty(size)  # sharded alike
        tensors[key] = torch.empty_like(like, dtype=description.properties.dtype)
    state_dict_loader.load(
        tensors, storage_reader=reader, process_group=ranks.on_cpu, no_dist=ranks.world == 1
    )
    _restore_optimizer(optimizer, [names[parameter] for parameter in parameters], tensors)
    of_cpu, of_gpu = (f"random/{kind}/{ranks.rank}" for kind in ("cpu", "cuda"))
    if of_cpu in tensors:
        torch.set_rng_state(tensors[of_cpu])
    if of_gpu in tensors and ranks.device.type == "cuda":
        torch.cuda.set_rng_state(tensors[of_gpu], ranks.device)
    windows = [value.to(ranks.device) for key, value in tensors.items() if key.startswith("window/")]
    if len(windows) == ranks.world:
        return tensors[f"window/{ranks.rank}"].to(ranks.device)
    return torch.stack(windows).sum(0) * float(ranks.is_main)


def _restore_optimizer(optimizer: Optimizer, names: list[str], tensors: Mapping[str, Tensor]) -> None:
    """Load the optimizer's states; ``names`` are its parameters', in its order."""
    indices = {name: index for index, name in enumerate(names)}
    states: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in tensors.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/")
            is_count = value.dim() == 0 and not value.is_floating_point()
            states[indices[name]][kind] = int(value) if is_count else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})


def remove(path: Path) -> None:
    """Remove a folder if it exists, or the link or file in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
