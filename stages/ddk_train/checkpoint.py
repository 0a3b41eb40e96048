"""A run's state on disk: what it takes to go on as if it had never stopped. safetensors and JSON only.

``checkpoint-<step>/`` holds ``state.json`` and what torch.distributed.checkpoint writes of the tensors, in
safetensors: trained weights and optimizer states, the sums since the last line of metrics, and random states.
Each process writes a part, under FSDP2 its shards, and any number of processes can go on, sharded or not.
Frozen weights are the source's.
"""

import json
import os
import shutil
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.optim import Optimizer

from ddk_cache.sampler import SamplerState
from ddk_train.distributed import Ranks
from ddk_train.errors import writing

# It says so in every run of one process, which asks for no more.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")

_behind = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")


@dataclass
class Progress:
    """How far a run is. ``sampler`` and ``factor`` are those of the interval that is under way."""

    sampler: SamplerState
    run_id: str  # what trackers know the run by
    step: int = 0  # optimizer steps done
    interval: int = 0
    factor: list[float] = field(default_factory=list)  # by domain, in the cache's order
    tokens: int = 0  # trained on so far, all processes

    def to_json(self, domains: Sequence[str]) -> dict[str, Any]:
        """With what belongs to a domain under its name."""
        drawn = dict(zip(domains, self.sampler.drawn, strict=True))
        sampler = {"drawn": drawn, "interval": self.sampler.interval}
        return {**vars(self), "sampler": sampler, "factor": dict(zip(domains, self.factor, strict=True))}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], domains: Sequence[str]) -> "Progress":
        drawn = tuple(data["sampler"]["drawn"][name] for name in domains)
        sampler = SamplerState(drawn, data["sampler"]["interval"])
        return cls(**{**data, "sampler": sampler, "factor": [data["factor"][name] for name in domains]})


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, whole by construction; None if there is none."""
    return next(reversed(_all(folder)), None)


def save(
    folder: Path,
    state: dict[str, Any],
    student: nn.Module,
    optimizer: Optimizer,
    window: Tensor,
    ranks: Ranks,
    *,
    keep: int,
    behind: bool = False,
) -> Future[None] | None:
    """Write ``checkpoint-<step>``, under another name until it is whole; only the ``keep`` newest stay.

    ``state`` is JSON: ``progress``, ``fingerprint`` and ``files`` (bytes of the run's JSON-lines files). All
    processes call it. ``behind``: from a copy in the machine's memory, while training goes on; wait for the
    result before the next call.
    """
    final = folder / f"checkpoint-{state['progress']['step']}"
    partial = folder / f"partial-{final.name}"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    tensors = {f"window/{ranks.rank}": window, f"random/cpu/{ranks.rank}": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors[f"random/cuda/{ranks.rank}"] = torch.cuda.get_rng_state(ranks.device)
    tensors |= _trained(student, optimizer)
    settings: dict[str, Any] = {
        "storage_writer": HuggingFaceStorageWriter(str(partial), save_distributed=True),
        "process_group": ranks.on_cpu,
        "no_dist": ranks.world == 1,
    }

    def finish(written: Callable[[], object]) -> None:
        with writing(partial):
            written()
        if ranks.is_main:
            (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
            _to_disk(partial / "state.json")
            _to_disk(partial)
            shutil.rmtree(final, ignore_errors=True)
            partial.rename(final)
            _to_disk(folder)
            remove_old(folder, keep)

    if behind:
        written: Any = state_dict_saver.async_save(tensors, **settings)  # returns once it has the copy
        return _behind.submit(finish, written.result)
    finish(lambda: state_dict_saver.save(tensors, **settings))
    return None


def remove_old(folder: Path, limit: int) -> None:
    """Keep the newest ``limit`` checkpoints, and nothing of one that was cut short."""
    for path in [*folder.glob("partial-checkpoint-*"), *_all(folder)[:-limit]]:
        doomed = path if path.name.startswith("partial-") else path.rename(folder / f"partial-{path.name}")
        shutil.rmtree(doomed)


def load(path: Path, student: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Tensor:
    """Put a checkpoint's weights, optimizer states and random states in place; returns the window's sums.

    With as many processes as wrote it, a run goes on to the bit. Otherwise the main process takes all of the
    window's sums, and a process that was not there keeps the random state it has.
    """
    reader = HuggingFaceStorageReader(str(path))
    names = {parameter: name for name, parameter in student.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    places: dict[str, Tensor] = {f"weight/{names[parameter]}": parameter.detach() for parameter in parameters}
    described: dict[str, Any] = reader.read_metadata().state_dict_metadata
    for key, stored in described.items():
        kind, _, name = key.rpartition("/")
        if key in places or (kind.startswith("random/") and name != str(ranks.rank)):
            continue
        place = torch.empty(stored.size, dtype=stored.properties.dtype)
        weight = places.get(f"weight/{name}")
        if weight is not None and weight.shape == place.shape:
            place = torch.empty_like(weight, dtype=place.dtype)  # sharded as it is
        places[key] = place
    together: dict[str, Any] = {"process_group": ranks.on_cpu, "no_dist": ranks.world == 1}
    state_dict_loader.load(places, storage_reader=reader, **together)

    numbers = {names[parameter]: number for number, parameter in enumerate(parameters)}
    states: dict[int, dict[str, Any]] = defaultdict(dict)
    for key, value in places.items():
        if key.startswith("optimizer/"):
            _, kind, name = key.split("/")
            is_count = value.dim() == 0 and not value.is_floating_point()
            states[numbers[name]][kind] = int(value) if is_count else value
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    if f"random/cpu/{ranks.rank}" in places:
        torch.set_rng_state(places[f"random/cpu/{ranks.rank}"])
        if ranks.device.type == "cuda":
            torch.cuda.set_rng_state(places[f"random/cuda/{ranks.rank}"], ranks.device)
    windows = [value.to(ranks.device) for key, value in places.items() if key.startswith("window/")]
    if len(windows) == ranks.world:
        return places[f"window/{ranks.rank}"].to(ranks.device)
    return torch.stack(windows).sum(0) * float(ranks.is_main)


def _trained(student: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """Every trained weight and its optimizer states, by unique names."""
    found: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"weight/{name}"] = parameter.detach()
        for kind, value in optimizer.state[parameter].items():
            # safetensors refuses tensors that share memory, as an 8-bit optimizer's small tables do.
            shares = isinstance(value, Tensor) and value.shape != parameter.shape
            found[f"optimizer/{kind}/{name}"] = value.clone() if shares else torch.as_tensor(value)
    return found


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _all(folder: Path) -> list[Path]:
    """Every whole checkpoint, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted((step for step in found if step.isdigit()), key=int)]
