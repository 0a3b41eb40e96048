"""How far the ingestion of a domain is, stored from time to time: a killed build loses a minute at most."""

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.data.document_index import DocumentIndex
from ddk_build.data.documents import IngestStatistics
from ddk_build.tokenize.blobs import from_blob, to_blob
from ddk_cache.format.layout import SPLITS, SplitName, SplitState

Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class IngestCheckpoint:
    """Everything that decides the rows of the rest of a domain's source."""

    plan: str
    """Digest of what is ingested; a checkpoint of another plan is ignored."""
    passes_done: int
    """Source passes before this one."""
    statistics: IngestStatistics
    index: DocumentIndex
    counts: Mapping[SplitName, SplitState]
    pending: Mapping[SplitName, Arrays]
    """Rows that do not fill a shard yet."""
    splitter: Mapping[str, Arrays]

    def to_bytes(self) -> bytes:
        """Serialise the checkpoint."""
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
        return to_blob(arrays)

    @classmethod
    def from_bytes(cls, data: bytes | None, plan: str) -> "IngestCheckpoint | None":
        """Return the checkpoint; None if it is missing, damaged or of another plan."""
        arrays = from_blob(data)
        if arrays is None:
            return None
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
