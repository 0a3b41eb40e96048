"""Which engine holds which shards, and what happens to them when it dies; pure."""

from collections import Counter, defaultdict, deque
from collections.abc import Sequence

from ddk_cache.errors import CacheError
from ddk_cache.format.layout import ShardKey

# Deaths at one shard, or of one engine without a finished shard in between, before the build fails.
MOST_DEATHS = 3
CALIBRATION: ShardKey = ShardKey("", "train", -1)  # queued in front of all shards


class Queue:
    """Shards that wait, and shards that an engine holds until it has written them."""

    def __init__(self, shards: Sequence[ShardKey]) -> None:
        self._waiting = deque(shards)
        self._held: dict[int, list[ShardKey]] = defaultdict(list)
        self._deaths: Counter[ShardKey] = Counter()

    def is_done(self) -> bool:
        """Return whether every shard is written."""
        return not self._waiting and not any(self._held.values())

    def holds(self, engine: int) -> bool:
        """Return whether the engine has shards that it has not written yet."""
        return bool(self._held[engine])

    def take(self, engine: int) -> ShardKey | None:
        """Give an engine the next shard; None if no shard waits."""
        if not self._waiting:
            return None
        self._held[engine].append(self._waiting.popleft())
        return self._held[engine][-1]

    def finish(self, engine: int, shards: Sequence[ShardKey]) -> None:
        """Remove the shards that an engine has written."""
        for shard in shards:
            self._held[engine].remove(shard)

    def give_back(self, engine: int, reason: str) -> None:
        """Put a dead engine's shards at the end of the queue, and count the death.

        The death counts against all of them: the engine may have been answering any.

        Raises CacheError if MOST_DEATHS engines have died at the same shard.
        """
        held = self._held.pop(engine, [])
        self._waiting.extend(held)
        self._deaths.update(held)
        deadly = [shard for shard in held if self._deaths[shard] == MOST_DEATHS]
        if deadly:
            names = ["the calibration" if shard == CALIBRATION else str(shard) for shard in deadly]
            raise CacheError(
                f"{' or '.join(names)}: {MOST_DEATHS} engines were lost over it, the last one: {reason}"
            )
