"""Which engine has which shards, and what becomes of them when it dies; pure."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from ddk_build.pipeline import ShardKey
from ddk_cache.errors import CacheError

DEATHS = 3  # of engines at one shard, or of one engine with no shard done between: then it is given up
CALIBRATION: ShardKey = ("", "train", -1)  # stands in a queue for what comes before all shards


class Queue:
    """Shards that wait, and those that an engine holds until it has written them."""

    def __init__(self, work: Sequence[ShardKey]) -> None:
        self._waiting = deque(work)
        self._held: dict[int, list[ShardKey]] = defaultdict(list)
        self._deaths: Counter[ShardKey] = Counter()

    def is_done(self) -> bool:
        return not self._waiting and not any(self._held.values())

    def holds(self, engine: int) -> bool:
        return bool(self._held[engine])

    def take(self, engine: int) -> ShardKey | None:
        """The next shard for an engine; None where all are in hands."""
        if not self._waiting:
            return None
        self._held[engine].append(self._waiting.popleft())
        return self._held[engine][-1]

    def finish(self, engine: int, places: Sequence[ShardKey]) -> None:
        """Shards that an engine has written."""
        for place in places:
            self._held[engine].remove(place)

    def give_back(self, engine: int, reason: str) -> None:
        """An engine is dead: its shards go to the end of the queue, the one that it was at among the last.

        It was at one of the two that it took last: the teacher answers one while the next is read.

        Raises
        ------
        CacheError
            DEATHS engines have died at that one.
        """
        held = self._held.pop(engine, [])
        self._waiting.extend(held)
        for place in held[-2:]:
            self._deaths[place] += 1
            if self._deaths[place] == DEATHS:
                domain, split, shard = place
                what = "the calibration" if place == CALIBRATION else f"{domain}: {split} shard {shard}"
                raise CacheError(f"{what}: {DEATHS} engines were lost over it, the last one thus: {reason}")
