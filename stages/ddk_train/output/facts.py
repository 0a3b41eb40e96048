"""run.json: the cache, versions, machine and times of a run, for its report."""

import os
import platform
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field

from ddk_cache import Cache
from ddk_cache.util import durable
from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from ddk_train.student.distributed import Ranks

FACTS = "run.json"
PACKAGES = ("ddk-cache", "torch", "transformers")


Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Facts(BaseModel):
    """The contents of run.json. Times are UTC; two fields are None until the student is saved."""

    model_config = ConfigDict(frozen=True)

    began: AwareDatetime
    ended: AwareDatetime | None = None
    student_step: Count | None = None  # the steps of the saved student
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


def write_facts(folder: Path, cache: Cache, config: TrainConfig, ranks: "Ranks", *, resumed: bool) -> None:
    """Write run.json at the start of a run; a ``resumed`` one keeps only the time at which it began."""
    import torch

    began = datetime.now(UTC).replace(microsecond=0)
    if resumed:
        with suppress(OSError, ValueError):  # a damaged file
            began = _read(folder).began
    hardware = f"{os.cpu_count()} cores, {platform.machine()}"
    if ranks.device.type == "cuda":
        hardware = torch.cuda.get_device_name(ranks.device)
    facts = Facts(
        began=began,
        versions={name: version(name) for name in PACKAGES} | {"python": platform.python_version()},
        machine=f"{hardware} ({platform.system()})",
        processes=ranks.world,
        rows_in_a_step=ranks.rows_in_a_step(config),
        teachers=[teacher.model for teacher in cache.manifest.teachers],
        target=cache.target.summary,
        seq_length=cache.seq_length,
        train_tokens={name: cache[name].state.train.tokens for name in cache.domains},
        train_rows={name: len(cache[name].train) for name in cache.domains},
        cache_bytes=sum(sum(storage.sizes("").values()) for storage in cache.storages),
    )
    _write(folder, facts)


def set_end(folder: Path, student_step: int) -> None:
    """Write to run.json that the run has ended now, and the steps of the student it saved."""
    now = datetime.now(UTC).replace(microsecond=0)
    _write(folder, _read(folder).model_copy(update={"ended": now, "student_step": student_step}))


def _read(folder: Path) -> Facts:
    return Facts.model_validate_json((folder / FACTS).read_bytes())


def _write(folder: Path, facts: Facts) -> None:
    durable.write(folder / FACTS, facts.model_dump_json(indent=1) + "\n")
