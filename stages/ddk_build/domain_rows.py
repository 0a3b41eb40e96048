"""Rows of a domain into its token shards."""

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ddk_build.packing import Row, batch
from ddk_cache.errors import ConfigError
from ddk_cache.layout import MOST_SHARDS, SPLITS, DomainState, SplitName, SplitState, shards
from ddk_cache.writer import Writer

Arrays = dict[str, NDArray[Any]]  # by name

WRITERS = 4  # shards that are being written


class DomainRows:
    """Gathers rows into shards, counts them, writes each full shard; goes on behind the rows of ``state``.

    Threads write, WRITERS shards at once at most; leaving it waits for them.
    """

    def __init__(self, writer: Writer, domain: str, state: DomainState | None = None) -> None:
        self.writer = writer
        self.domain = domain
        empty = SplitState(rows=0, tokens=0, labels=0)
        self.counts: dict[SplitName, SplitState] = {
            split: empty if state is None else state.split(split) for split in SPLITS
        }
        """Of all rows, those in ``waiting`` included."""
        self.waiting: dict[SplitName, Arrays] = {
            split: vars(batch([], writer.manifest.seq_length)) for split in SPLITS
        }
        """Rows that do not fill a shard yet."""
        for split, counts in self.counts.items():
            if counts.rows % writer.manifest.shard_rows:
                last = shards(counts.rows, writer.manifest.shard_rows) - 1
                self.waiting[split] = writer.read_tokens(domain, split, last)
        self._rows: dict[SplitName, list[Row]] = {split: [] for split in SPLITS}
        self._writes: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(WRITERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, split: SplitName, rows: list[Row]) -> None:
        """Write each shard that is full with these rows."""
        self._rows[split] += rows
        if len(self._rows[split]) + len(self.waiting[split]["tokens"]) >= self.writer.manifest.shard_rows:
            self._lay_out(split)

    def settle(self) -> None:
        """See that all rows are on disk, or in ``waiting``."""
        for split in SPLITS:
            self._lay_out(split)
        self._wait(0)

    def flush(self) -> None:
        """Write the last shard of each split, which may be a part of one."""
        self.settle()
        for split, rows in self.waiting.items():
            if len(rows["tokens"]):
                shard = self.counts[split].rows // self.writer.manifest.shard_rows
                self.writer.write_tokens(self.domain, split, shard, rows)

    def _lay_out(self, split: SplitName) -> None:
        size = self.writer.manifest.shard_rows
        new = batch(self._rows[split], self.writer.manifest.seq_length)
        self._rows[split] = []
        before, waiting = self.counts[split], self.waiting[split]
        self.counts[split] = SplitState(
            rows=before.rows + len(new.tokens),
            tokens=before.tokens + int((new.segments > 0).sum()),
            labels=before.labels + int(new.loss_mask.sum()),
        )
        rows = {array: np.concatenate([waiting[array], values]) for array, values in vars(new).items()}
        first, whole = before.rows // size, len(rows["tokens"]) // size
        if first + whole >= MOST_SHARDS:
            raise ConfigError(
                f"domains.{self.domain}: makes more than {MOST_SHARDS:,} shards: raise shard_tokens"
            )
        for number in range(whole):
            part = {array: values[number * size :][:size] for array, values in rows.items()}
            write = self._pool.submit(self.writer.write_tokens, self.domain, split, first + number, part)
            self._writes.append(write)
            self._wait(WRITERS)
        self.waiting[split] = {array: values[whole * size :].copy() for array, values in rows.items()}

    def _wait(self, most: int) -> None:
        while len(self._writes) > most:
            self._writes.popleft().result()
