"""Checkpoints of a domain's ingestion, so that a killed build loses half a minute at most."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from safetensors.numpy import load, save

from ddk_build.data.documents import IngestStatistics
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.packer import Arrays
from ddk_cache.format.layout import SPLITS, SplitName, SplitState

DIGEST_BYTES = 32  # sha256, in front of everything else


@dataclass(frozen=True)
class IngestCheckpoint:
    """Everything that decides the rows of the rest of a domain's source."""

    plan: str
    """Digest of the plan; a checkpoint of another plan is ignored."""
    passes_done: int
    """Source passes before the current pass."""
    statistics: IngestStatistics
    index: DocumentIndex
    counts: Mapping[SplitName, SplitState]
    pending: Mapping[SplitName, Arrays]
    """Rows that do not fill a shard yet."""
    splitter: Mapping[str, Arrays]

    def to_bytes(self) -> bytes:
        """Serialise the checkpoint, as safetensors behind their sha256."""
        facts = {
            "plan": self.plan,
            "passes_done": self.passes_done,
            "statistics": vars(self.statistics),
            "counts": {split: counts.model_dump() for split, counts in self.counts.items()},
        }
        groups: dict[str, Arrays] = {**self.splitter, **{split: self.pending[split] for split in SPLITS}}
        arrays = {
            f"{group}/{name}": array for group, named in groups.items() for name, array in named.items()
        }
        arrays["facts"] = np.frombuffer(json.dumps(facts).encode(), np.uint8)
        arrays["index"] = np.frombuffer(self.index.to_bytes(), np.uint8)
        body = save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        return sha256(body).digest() + body

    @classmethod
    def from_bytes(cls, data: bytes | None, plan: str) -> "IngestCheckpoint | None":
        """Return the checkpoint; None if it is missing, damaged or of another plan."""
        if data is None or sha256(data[DIGEST_BYTES:]).digest() != data[:DIGEST_BYTES]:
            return None
        arrays: Arrays = load(data[DIGEST_BYTES:])
        facts = json.loads(arrays.pop("facts").tobytes())
        index = DocumentIndex.from_bytes(arrays.pop("index").tobytes())
        if facts["plan"] != plan or index is None:
            return None
        groups: dict[str, Arrays] = {}
        for key, array in arrays.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = array
        facts["statistics"]["skipped"] = Counter(facts["statistics"]["skipped"])
        return cls(
            plan,
            facts["passes_done"],
            IngestStatistics(**facts["statistics"]),
            index,
            {split: SplitState(**facts["counts"][split]) for split in SPLITS},
            {split: groups.pop(split) for split in SPLITS},
            groups,
        )
