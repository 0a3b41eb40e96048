"""Whether a checkpoint may be gone on from: what decides a run's numbers, then and now, compared by key."""

import hashlib
import json
from pathlib import Path
from typing import Any

from ddk_cache import Cache
from ddk_cache.codec import Codebook
from ddk_cache.configuration import flat
from ddk_cache.errors import ConfigError
from ddk_cache.model_folder import model_digest
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks

LAYOUT = 3  # of what stands in a checkpoint

# Keys that may change between stop and resume: none of them changes what is learned. The cache is known by
# what it holds; and the rows of a step may be shared out otherwise, which changes the last bits of a sum.
FREE_KEYS = {
    "cache", "output_dir", "logging_steps", "save_steps", "save_total_limit", "save_behind", "report_to",
    "num_reader_threads", "timeout_minutes", "trust_remote_code", "fsdp", "sample_tokens",
    "per_device_train_batch_size", "gradient_accumulation_steps",
}  # fmt: skip


def fingerprint(config: TrainConfig, cache: Cache, ranks: Ranks) -> dict[str, Any]:
    """What has to be the same when a run goes on, by dotted key."""
    found = {
        "layout of the checkpoint": LAYOUT,
        **flat(config.model_dump(mode="json", exclude=FREE_KEYS)),
        "rows in a step": ranks.rows_in_a_step(config),
        "domains": list(cache.domains),  # in this order: it decides the draws
        **flat(cache.manifest.model_dump(mode="json", exclude={"teachers", "domains"}), "cache."),
    }
    if config.lora is not None and Path(config.student).is_dir():  # a checkpoint holds the adapters alone
        found["frozen weights"] = model_digest(Path(config.student))
    for name in cache.domains:
        train, state = cache[name].train, cache[name].state
        teacher = cache.manifest.teacher_of(name).model_dump(mode="json", exclude={"engine_version"})
        found |= flat(teacher, f"teacher of {name}.")
        found |= flat(cache.manifest.domain(name).source, f"source of {name}.")
        found[f"training rows of {name}"] = len(train)
        found[f"validation rows of {name}"] = len(cache[name].validation)
        found[f"teacher_cross_entropy of {name}"] = state.teacher_cross_entropy
        found[f"codebook of {name}"] = _digest(train.codebook)
        found[f"build of {name}"] = cache.manifest.domain(name).build_id
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
        f"{key} was {_shown(before, key)} and is {_shown(wanted, key)}"
        for key in {**before, **wanted}
        if _shown(before, key) != _shown(wanted, key)
    ]
    if differences:
        raise ConfigError(f"--resume: {path} belongs to another run: {'; '.join(differences)}")
    return state


def _shown(found: dict[str, Any], key: str) -> str:
    return repr(found[key]) if key in found else "absent"


def _digest(codebook: Codebook | None) -> str | None:
    if codebook is None:
        return None
    digest = hashlib.sha256()
    for name, array in sorted(codebook.arrays().items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
    return digest.hexdigest()
