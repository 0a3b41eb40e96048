"""Write a domain's rows into its token shards."""

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Self

import numpy as np

from ddk_build.data.packing.packer import Arrays, Row, to_arrays
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import MOST_SHARDS, SPLITS, DomainState, SplitName, SplitState, shards

WRITERS = 4  # shards written at once


class TokenShards:
    """Collects rows, counts them, and writes each full shard; begins after the rows of ``state``.

    Threads write; leaving the context waits for them.
    """

    def __init__(self, writer: Writer, domain: str, state: DomainState | None = None) -> None:
        self._writer, self._domain = writer, domain
        self.counts = {split: SplitState() if state is None else state.split(split) for split in SPLITS}
        """Of all rows, with the pending ones."""
        self._pending: dict[SplitName, Arrays] = {split: self._arrays([]) for split in SPLITS}
        for split, counts in self.counts.items():
            if counts.rows % writer.manifest.shard_rows:
                last = shards(counts.rows, writer.manifest.shard_rows) - 1
                self._pending[split] = writer.read_tokens(domain, split, last)
        self._rows: dict[SplitName, list[Row]] = {split: [] for split in SPLITS}
        self._writes: deque[Future[None]] = deque()
        self._pool = ThreadPoolExecutor(WRITERS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def add(self, split: SplitName, rows: Sequence[Row]) -> None:
        """Add rows, and write each shard that they fill."""
        self._rows[split] += rows
        if len(self._rows[split]) + len(self._pending[split]["tokens"]) >= self._writer.manifest.shard_rows:
            self._write_full_shards(split)

    def sync(self) -> Mapping[SplitName, Arrays]:
        """Write all full shards and wait for them; return the pending rows, which do not fill a shard."""
        for split in SPLITS:
            self._write_full_shards(split)
        self._wait(0)
        return self._pending

    def restore(self, counts: Mapping[SplitName, SplitState], pending: Mapping[SplitName, Arrays]) -> None:
        """Resume from the counts and the result of ``sync``."""
        self.counts, self._pending = dict(counts), dict(pending)

    def flush(self) -> None:
        """Write the last shard of each split, full or not."""
        for split, rows in self.sync().items():
            if len(rows["tokens"]):
                shard = self.counts[split].rows // self._writer.manifest.shard_rows
                self._writer.write_tokens(self._domain, split, shard, rows)

    def _write_full_shards(self, split: SplitName) -> None:
        size = self._writer.manifest.shard_rows
        new = self._arrays(self._rows[split])
        self._rows[split] = []
        before, self.counts[split] = self.counts[split], self.counts[split].plus(new)
        rows = {name: np.concatenate([self._pending[split][name], array]) for name, array in new.items()}
        first, count = before.rows // size, len(rows["tokens"]) // size
        if first + count >= MOST_SHARDS:
            raise ConfigError(
                f"domains.{self._domain}: makes more than {MOST_SHARDS:,} shards: raise shard_tokens"
            )
        for index in range(count):
            shard = {name: array[index * size :][:size] for name, array in rows.items()}
            write = self._pool.submit(self._writer.write_tokens, self._domain, split, first + index, shard)
            self._writes.append(write)
            self._wait(WRITERS)
        self._pending[split] = {name: array[count * size :].copy() for name, array in rows.items()}

    def _arrays(self, rows: Sequence[Row]) -> Arrays:
        manifest = self._writer.manifest
        source = manifest.domain(self._domain)
        return to_arrays(
            rows,
            manifest.seq_length,
            writer_logprob=source.has_writer_logprob,
            has_prefix=source.has_teacher_prefix,
        )

    def _wait(self, most: int) -> None:
        while len(self._writes) > most:
            self._writes.popleft().result()
