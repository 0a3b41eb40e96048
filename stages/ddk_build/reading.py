"""How far the reading of a domain is, kept from time to time, so that a kill costs a minute at most."""

import json
from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.documents import Intake
from ddk_build.kept import pack_arrays, unpack_arrays
from ddk_build.ledger import Ledger
from ddk_cache.layout import SplitName, SplitState

Arrays = dict[str, NDArray[Any]]  # by name


@dataclass
class Reading:
    """Everything that decides what comes out of the rest of a domain's source."""

    plan: str
    """Digest of what is to be read, and beside which domains; another plan begins anew."""
    done: int
    """Limits that were read before."""
    intake: Intake
    ledger: Ledger
    before: Ledger
    """The ledger as it was when the reading up to this limit began."""
    counts: dict[SplitName, SplitState]
    waiting: dict[SplitName, Arrays]
    """Rows that do not fill a shard yet."""
    packed: dict[str, Arrays]
    """Of the ``Splitter``."""

    def to_bytes(self) -> bytes:
        """For ``from_bytes``."""
        facts = {
            "plan": self.plan,
            "done": self.done,
            "intake": vars(self.intake),
            "counts": {split: counts.model_dump() for split, counts in self.counts.items()},
        }
        groups = self.packed | {f"waiting {split}": rows for split, rows in self.waiting.items()}
        arrays = {f"{group}/{name}": array for group, some in groups.items() for name, array in some.items()}
        for name, data in (
            ("facts", json.dumps(facts).encode()),
            ("ledger", self.ledger.pack()),
            ("before", self.before.pack()),
        ):
            arrays[name] = np.frombuffer(data, np.uint8)
        return pack_arrays(arrays)

    @classmethod
    def from_bytes(cls, data: bytes | None, plan: str) -> "Reading | None":
        """What was kept; None where it is damaged, or of another plan."""
        found = unpack_arrays(data)
        if found is None:
            return None
        facts = json.loads(found.pop("facts").tobytes())
        if facts["plan"] != plan:
            return None
        ledger, before = (Ledger.unpack(found.pop(name).tobytes()) for name in ("ledger", "before"))
        assert ledger is not None
        assert before is not None
        groups: dict[str, Arrays] = {}
        for key, array in found.items():
            group, _, name = key.partition("/")
            groups.setdefault(group, {})[name] = array
        facts["intake"]["skipped"] = Counter(facts["intake"]["skipped"])
        counts: dict[SplitName, SplitState] = {
            split: SplitState(**counts) for split, counts in facts["counts"].items()
        }
        return cls(
            plan,
            facts["done"],
            Intake(**facts["intake"]),
            ledger,
            before,
            counts,
            {split: groups.pop(f"waiting {split}") for split in counts},
            groups,
        )
