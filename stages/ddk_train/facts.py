"""run.json: what a run's other files do not say and its report tells: cache, versions, machine, times."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import torch
from pydantic import AwareDatetime, BaseModel, ConfigDict

from ddk_cache import Cache
from ddk_cache.inspection import describe_target

FACTS = "run.json"
PACKAGES = ("ddk-cache", "torch", "transformers")


class Facts(BaseModel):
    """Times are UTC; ``ended`` is missing until the student is saved."""

    model_config = ConfigDict(frozen=True)

    began: AwareDatetime
    ended: AwareDatetime | None = None
    versions: dict[str, str]
    machine: str
    processes: int
    teachers: list[str]
    target: str
    seq_length: int
    train_tokens: dict[str, int]
    """By domain, in the cache."""
    cache_bytes: int
    """As stored."""


def write_facts(folder: Path, cache: Cache, device: torch.device, processes: int) -> None:
    """Write them where a run begins."""
    gpu = device.type == "cuda"
    place = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} cores, {platform.machine()}"
    facts = Facts(
        began=datetime.now(UTC).replace(microsecond=0),
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        machine=f"{place} ({platform.system()})",
        processes=processes,
        teachers=[teacher.model for teacher in cache.manifest.teachers],
        target=describe_target(cache.target.model_dump()),
        seq_length=cache.seq_length,
        train_tokens={name: cache[name].state.train.tokens for name in cache.domains},
        cache_bytes=sum(cache.storage.sizes("").values()),
    )
    (folder / FACTS).write_text(facts.model_dump_json(indent=1) + "\n", encoding="utf-8")


def finish_facts(folder: Path) -> None:
    """Note that the run has ended, where facts were written."""
    path = folder / FACTS
    if path.is_file():
        facts = Facts.model_validate_json(path.read_text(encoding="utf-8"))
        ended = facts.model_copy(update={"ended": datetime.now(UTC).replace(microsecond=0)})
        path.write_text(ended.model_dump_json(indent=1) + "\n", encoding="utf-8")
