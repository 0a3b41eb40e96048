"""A run's state on disk: what it takes to go on as if it had never stopped. safetensors and JSON only.

``checkpoint-<step>/`` holds ``state.json`` and a file of tensors by process, ``rank-<r>.safetensors``:
trained weights and optimizer states (each process its own shard under FSDP2, else the main one's file has
them all), the sums since the last line of metrics, and random states. Frozen weights are the source's.
"""

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_cache.sampler import SamplerState
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks
from ddk_train.errors import writing

# Keys that may change between stop and resume: none of them changes what is learned.
FREE_KEYS = {
    "output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to", "num_reader_threads",
    "timeout_minutes", "trust_remote_code",
}  # fmt: skip


@dataclass
class Progress:
    """How far a run is. ``sampler`` and ``factor`` are those of the interval that is under way."""

    sampler: SamplerState
    run_id: str  # what trackers know the run by
    step: int = 0  # optimizer steps done
    interval: int = 0
    factor: list[float] = field(default_factory=list)  # by domain
    tokens: int = 0  # trained on so far, all processes

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "sampler": self.sampler.to_json()}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> "Progress":
        return cls(**{**data, "sampler": SamplerState.from_json(data["sampler"])})


def newest(folder: Path) -> Path | None:
    """The checkpoint of the highest step, whole by construction; None if there is none."""
    return next(reversed(_all(folder)), None)


def fingerprint(config: TrainConfig, cache: Cache, ranks: Ranks) -> dict[str, Any]:
    """What has to be the same when a run goes on."""
    found = config.model_dump(mode="json", exclude=FREE_KEYS)
    found["number of processes"] = ranks.world
    found["tokenizer of the cache"] = cache.tokenizer_hash
    found |= {f"training rows of {name}": len(cache[name].train) for name in cache.domains}
    return found


def read_state(path: Path, wanted: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's ``state.json``, if its fingerprint is ``wanted``.

    Raises
    ------
    ConfigError
        Something has changed since; the message lists all of it.
    """
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    before = state["fingerprint"]
    differences = [
        f"{key} was {before.get(key)!r} and is {wanted.get(key)!r}"
        for key in {**before, **wanted}
        if before.get(key) != wanted.get(key)
    ]
    if differences:
        raise ConfigError(f"--resume: {path} belongs to another run: {'; '.join(differences)}")
    return state


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
    ranks.barrier()
    if ranks.is_main:
        (partial / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)


def remove_old(folder: Path, limit: int) -> None:
    """Keep the newest ``limit`` checkpoints, and nothing of one that was cut short."""
    for path in [*folder.glob("partial-checkpoint-*"), *_all(folder)[:-limit]]:
        doomed = path if path.name.startswith("partial-") else path.rename(folder / f"partial-{path.name}")
        shutil.rmtree(doomed)


def load(path: Path, student: nn.Module, optimizer: Optimizer, ranks: Ranks) -> Tensor:
    """Put a checkpoint's weights, optimizer states and random states in place; returns the window's sums."""
    own = load_file(_file(path, ranks.rank))
    trained = own if ranks.is_main or isinstance(student, FSDPModule) else load_file(_file(path, 0))
    names = {parameter: name for name, parameter in student.named_parameters()}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    states: dict[int, dict[str, Any]] = {}
    for number, parameter in enumerate(parameters):
        name = names[parameter]
        with torch.no_grad():
            _local(parameter).copy_(trained[f"weight/{name}"])
        states[number] = {
            key.split("/")[1]: _as_state(tensor, parameter)
            for key, tensor in trained.items()
            if key.startswith("optimizer/") and key.split("/")[2] == name
        }
    optimizer.load_state_dict({"state": states, "param_groups": optimizer.state_dict()["param_groups"]})
    torch.set_rng_state(own["random/cpu"])
    if ranks.device.type == "cuda":
        torch.cuda.set_rng_state(own["random/cuda"], ranks.device)
    return own["window"].to(ranks.device)


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


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _file(path: Path, rank: int) -> Path:
    return path / f"rank-{rank}.safetensors"


def _all(folder: Path) -> list[Path]:
    """Every whole checkpoint, oldest first."""
    found = {path.name.removeprefix("checkpoint-"): path for path in folder.glob("checkpoint-*")}
    return [found[step] for step in sorted((step for step in found if step.isdigit()), key=int)]
