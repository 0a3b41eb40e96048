"""run.json: the cache, versions, machine and times of a run, for its report."""

import os
import platform
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from ddk_cache import Cache
from ddk_cache.util import durable

if TYPE_CHECKING:
    import torch

FACTS = "run.json"
PACKAGES = ("ddk-cache", "torch", "transformers")


Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Facts(BaseModel):
    """The contents of run.json. Times are UTC; ``ended`` is None until the student is saved."""

    model_config = ConfigDict(frozen=True)

    began: AwareDatetime
    ended: AwareDatetime | None = None
    versions: dict[str, str]
    machine: str
    processes: Count
    rows_in_a_step: Count = 0  # of all processes; 0 in a file that does not have it
    teachers: list[str]
    target: str
    seq_length: Count
    train_tokens: dict[str, Count]  # in the cache, by domain
    train_rows: dict[str, Count] = Field(default_factory=dict)
    cache_bytes: Count  # as stored


def write_facts(
    folder: Path, cache: Cache, device: "torch.device", processes: int, rows_in_a_step: int
) -> None:
    """Write run.json at the start of a run."""
    import torch

    gpu = device.type == "cuda"
    hardware = torch.cuda.get_device_name(device) if gpu else f"{os.cpu_count()} cores, {platform.machine()}"
    facts = Facts(
        began=datetime.now(UTC).replace(microsecond=0),
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        machine=f"{hardware} ({platform.system()})",
        processes=processes,
        rows_in_a_step=rows_in_a_step,
        teachers=[teacher.model for teacher in cache.manifest.teachers],
        target=cache.target.summary,
        seq_length=cache.seq_length,
        train_tokens={name: cache[name].state.train.tokens for name in cache.domains},
        train_rows={name: len(cache[name].train) for name in cache.domains},
        cache_bytes=sum(sum(storage.sizes("").values()) for storage in cache.storages),
    )
    _write(folder, facts)


def set_end(folder: Path, *, ended: bool) -> None:
    """Write to run.json the time at which the run ended, or None while it runs."""
    facts = Facts.model_validate_json((folder / FACTS).read_bytes())
    now = datetime.now(UTC).replace(microsecond=0)
    _write(folder, facts.model_copy(update={"ended": now if ended else None}))


def _write(folder: Path, facts: Facts) -> None:
    durable.write(folder / FACTS, facts.model_dump_json(indent=1) + "\n")
