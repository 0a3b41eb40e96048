"""Check that a run may resume from a checkpoint: compare, key by key, what decides its results."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_cache.format.codebook import Codebook
from ddk_cache.util.configuration import flat
from ddk_cache.util.model_folder import model_digest
from ddk_train.config import TrainConfig
from ddk_train.student.distributed import Ranks

LAYOUT = 3  # of the contents of a checkpoint

# Keys that may change on resume, because they do not change the results. A cache is recognised by its
# contents. Dividing the rows of a step differently changes last bits only.
FREE_KEYS = {
    "cache", "output_dir", "logging_steps", "save_steps", "save_total_limit", "save_behind", "report_to",
    "num_reader_threads", "timeout_minutes", "trust_remote_code", "fsdp", "sample_tokens",
    "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


def fingerprint(config: TrainConfig, cache: Cache, ranks: Ranks) -> dict[str, Any]:
    """Return the values that must not change when a run resumes, by dotted key."""
    values = {
        "layout of the checkpoint": LAYOUT,
        **flat(config.model_dump(mode="json", exclude=FREE_KEYS)),
        "rows in a step": ranks.rows_in_a_step(config),
        "domains": list(cache.domains),  # their order decides the draws
        **flat(cache.manifest.model_dump(mode="json", exclude={"teachers", "domains"}), "cache."),
    }
    if config.lora is not None and Path(config.student).is_dir():  # a checkpoint holds only the adapters
        values["frozen weights"] = model_digest(Path(config.student))
    for name in cache.domains:
        train, state = cache[name].train, cache[name].state
        teacher = cache.manifest.teacher_of(name).model_dump(mode="json", exclude={"engine_version"})
        values |= flat(teacher, f"teacher of {name}.")
        values |= flat(cache.manifest.domain(name).source, f"source of {name}.")
        values[f"training rows of {name}"] = len(train)
        values[f"validation rows of {name}"] = len(cache[name].validation)
        values[f"teacher_cross_entropy of {name}"] = state.teacher_cross_entropy
        values[f"codebook of {name}"] = _digest(train.codebook)
        values[f"build of {name}"] = cache.manifest.domain(name).build_id
    return values


def read_state(path: Path, expected: dict[str, Any]) -> dict[str, Any]:
    """Return a checkpoint's ``state.json``; raise ConfigError, with all differences, for another run's."""
    state: dict[str, Any] = json.loads((path / "state.json").read_text(encoding="utf-8"))
    stored = state["fingerprint"]
    differences = [
        f"{key} was {_shown(stored, key)} and is {_shown(expected, key)}"
        for key in {**stored, **expected}
        if _shown(stored, key) != _shown(expected, key)
    ]
    if differences:
        raise ConfigError(f"--resume: {path} belongs to another run: {'; '.join(differences)}")
    return state


def _shown(values: dict[str, Any], key: str) -> str:
    return repr(values[key]) if key in values else "absent"


def _digest(codebook: Codebook | None) -> str | None:
    if codebook is None:
        return None
    digest = hashlib.sha256()
    for name, array in sorted(codebook.arrays().items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
