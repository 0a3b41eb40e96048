"""A run's state on disk: what it takes to go on as if it had never stopped. safetensors and JSON only.

``checkpoint-<step>/`` holds ``state.json`` and a file of tensors by process, ``rank-<r>.safetensors``:
trained weights and optimizer states (each process its own rows of them under FSDP2, else the main one's file
has them all), the sums since the last line of metrics, and random states. Frozen weights are the source's.
Whole weights are the files' parts one after another, so any number of processes can go on, sharded or not.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ddk_cache.sampler import SamplerState
from ddk_train.distributed import Ranks
from ddk_train.errors import writing


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
) -> None:
    """Write ``checkpoint-<step>``, under another name until it is whole. All processes call it.

    ``state`` is JSON: ``progress``, ``fingerprint`` and ``files`` (bytes of the run's JSON-lines files).
    """
    final = folder / f"checkpoint-{state['progress']['step']}"
    partial = folder / f"partial-{final.name}"
    if ranks.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    ranks.barrier()
    tensors = {"window": window, "random/cpu": torch.get_rng_state()}
    if ranks.device.type == "cuda":
        tensors["random/cuda"] = torch.cuda.get_rng_state(ranks.device)
    if ranks.is_main or isinstance(student, FSDPModule):
        tensors |= _trained_tensors(student, optimizer)
    # Clones, because safetensors refuses tensors that share memory, as some of an 8-bit optimizer's do.
    clones = {name: tensor.detach().cpu().clone() for name, tensor in tensors.items()}
    with writing(partial):
        save_file(clones, _file(partial, ranks.rank))
    _to_disk(_file(partial, ranks.rank))
    ranks.barrier()
    if ranks.is_main:
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        _to_disk(partial / "state.json")
        _to_disk(partial)
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        _to_disk(folder)


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
    with ExitStack() as stack:
        files = [
            stack.enter_context(safe_open(_file(path, rank), framework="pt"))
            for rank in range(len(list(path.glob("rank-*.safetensors"))))
        ]
        holders: dict[str, list[Any]] = {}  # of a tensor's name: the files that have a part of it
        for file in files:
            stored = file.keys()
            for name in stored:
                holders.setdefault(name, []).append(file)
        names = {parameter: name for name, parameter in student.named_parameters()}
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        states: dict[int, dict[str, Any]] = {}
        for number, parameter in enumerate(parameters):
            name = names[parameter]
            with torch.no_grad():
                _local(parameter).copy_(_read(holders, f"weight/{name}", parameter, ranks))
            states[number] = {
                key.split("/")[1]: _as_state(_read(holders, key, parameter, ranks), parameter)
                for key in holders
                if key.startswith("optimizer/") and key.split("/")[2] == name
            }
        optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
        if ranks.rank < len(files):
            own = files[ranks.rank]
            torch.set_rng_state(own.get_tensor("random/cpu"))
            if ranks.device.type == "cuda":
                torch.cuda.set_rng_state(own.get_tensor("random/cuda"), ranks.device)
        windows: list[Tensor] = [file.get_tensor("window") for file in files]
    if len(windows) == ranks.world:
        return windows[ranks.rank].to(ranks.device)
    return (torch.stack(windows).sum(0) * float(ranks.is_main)).to(ranks.device)


def _trained_tensors(student: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """This process's part of every trained weight and of its optimizer states, by unique names."""
    found: dict[str, Tensor] = {}
    for name, parameter in student.named_parameters():
        if not parameter.requires_grad:
            continue
        found[f"weight/{name}"] = _local(parameter)
        for key, value in optimizer.state[parameter].items():
            found[f"optimizer/{key}/{name}"] = (
                _local(value) if isinstance(value, Tensor) else torch.tensor(value)
            )
    return found


def _as_state(tensor: Tensor, parameter: Tensor) -> Any:
    """An optimizer state as it was: a whole number, a tensor, or a shard laid out as its weight is."""
    if tensor.dim() == 0:
        return tensor if tensor.is_floating_point() else int(tensor)
    if not isinstance(parameter, DTensor):
        return tensor
    tensor = tensor.to(parameter.device)
    layout = parameter.device_mesh, parameter.placements
    return DTensor.from_local(tensor, *layout, shape=parameter.shape, stride=parameter.stride())


def _read(holders: Mapping[str, Sequence[Any]], name: str, like: Tensor, ranks: Ranks) -> Tensor:
    """A tensor that lies in one file, or in several by rows; if ``like`` is sharded, its shard."""
    found = [file.get_slice(name) for file in holders[name]]
    if not found[0].get_shape():
        whole: Tensor = holders[name][0].get_tensor(name)
        return whole
    ends = list(accumulate(part.get_shape()[0] for part in found))
    first, last = 0, ends[-1]
    if isinstance(like, DTensor):
        size = -(-last // ranks.world)  # as torch.chunk divides
        first, last = min(ranks.rank * size, last), min((ranks.rank + 1) * size, last)
    pieces = []
    for part, end in zip(found, ends, strict=True):
        begin = end - part.get_shape()[0]
        pieces.append(part[max(first - begin, 0) : max(min(last, end) - begin, 0)])
    return torch.cat(pieces)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, would outlive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def _file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank}.safetensors"


def _all(folder: Path) -> list[Path]:
    """Every whole checkpoint, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted((step for step in found if step.isdigit()), key=int)]
