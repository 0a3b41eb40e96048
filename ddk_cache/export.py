"""A cache's training rows as parquet files that other trainers read; docs/export.md says what they hold.

One file a shard, complete or not there, so that an export goes on where it was.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache import export_formats
from ddk_cache.errors import CacheError, ConfigError, counted
from ddk_cache.reader import Cache
from ddk_cache.split_reader import Rows

Table = Callable[[Rows], pa.Table]
FORMATS: dict[str, Table] = {
    "axolotl": export_formats.axolotl,
    "distillkit": export_formats.distillkit,
    "parquet": export_formats.plain,
}
NOTE = "export.json"
SAMPLE_ROWS = 8  # of each domain, encoded for the forecast
ENTRIES = 1 << 22  # decoded at a time: memory of about 100 MiB


@dataclass(frozen=True)
class Forecast:
    """What a domain's files will come to."""

    rows: int
    tokens: int
    bytes: int


class Export:
    """An export that is ready to be written.

    Parameters
    ----------
    cache
        An open cache.
    folder
        Where the files go: ``<domain>/00000.parquet`` and so on.
    form
        A key of ``FORMATS``.
    domains
        Some of the cache's; none means all.
    rows
        At most so many of each domain, its first; None takes all.

    Raises
    ------
    ConfigError
        There is no such domain, the folder holds another export, or the cache has labels alone.
    """

    def __init__(
        self, cache: Cache, folder: Path, form: str, domains: Sequence[str] = (), rows: int | None = None
    ) -> None:
        for name in domains:
            if name not in cache:
                raise ConfigError(f"--domain {name}: the cache has {', '.join(cache.domains)}")
        self._cache, self._folder, self._form = cache, folder, form
        self.rows = {
            name: min(len(cache[name].train), rows or len(cache[name].train))
            for name in cache.domains
            if name in domains or not domains
        }
        self._step = max(1, ENTRIES // (cache.seq_length * max(cache.target.width, 1)))  # rows at a time
        self._note = json.dumps(
            {
                "format": form,
                "rows": self.rows,
                "manifest_sha256": hashlib.sha256(cache.manifest.model_dump_json().encode()).hexdigest(),
            }
        )
        there = folder / NOTE
        if there.is_file() and there.read_text(encoding="utf-8") != self._note:
            raise ConfigError(f"{folder}: holds an export of another cache, format or choice of rows")
        if not there.is_file() and folder.is_dir() and any(folder.iterdir()):
            raise ConfigError(f"{folder}: is not empty and holds no export; name a new folder")

    def forecast(self) -> dict[str, Forecast]:
        """Rows, tokens and, from a few rows of each domain, bytes."""
        found = {}
        for name, rows in self.rows.items():
            taken = np.unique(
                np.linspace(0, max(rows - 1, 0), min(rows, SAMPLE_ROWS, self._step)).astype(int)
            )
            sample = self._cache[name].train.read(taken)
            file = io.BytesIO()
            pq.write_table(FORMATS[self._form](sample), file, compression="zstd")
            scale = rows / max(len(taken), 1)
            tokens = int((sample.segments > 0).sum())
            found[name] = Forecast(rows, round(tokens * scale), round(file.tell() * scale))
        return found

    def write(self) -> Iterator[int]:
        """Write what is not there yet; yields the number of rows after each file, those found included.

        Raises
        ------
        CacheError
            The cache cannot be read, or the forecast does not fit on the disk.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        files = [*self._files()]
        left = sum(count for path, _, _, count in files if not path.exists())
        expected = self.forecast()
        size = sum(part.bytes for part in expected.values()) * left // max(sum(self.rows.values()), 1)
        free = shutil.disk_usage(self._folder).free
        if size > free:
            raise CacheError(f"{self._folder}: about {size:,} bytes are needed, and {free:,} are free")
        (self._folder / NOTE).write_text(self._note, encoding="utf-8")
        for path, domain, start, count in files:
            if not path.exists():
                self._write_file(path, domain, start, count)
            yield count

    def _files(self) -> Iterator[tuple[Path, str, int, int]]:
        """Path, domain, first row and number of rows of each file."""
        step = self._cache.manifest.shard_rows
        for name, rows in self.rows.items():
            for start in range(0, rows, step):
                path = self._folder / name / f"{start // step:05}.parquet"
                yield path, name, start, min(step, rows - start)

    def _write_file(self, path: Path, domain: str, start: int, count: int) -> None:
        path.parent.mkdir(exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        split = self._cache[domain].train
        writer: Any = None
        for first in range(start, start + count, self._step):
            rows = split.read(np.arange(first, min(first + self._step, start + count)))
            table = FORMATS[self._form](rows)
            writer = writer or pq.ParquetWriter(unfinished, table.schema, compression="zstd")
            writer.write_table(table)
        writer.close()
        os.replace(unfinished, path)


def as_text(forecast: dict[str, Forecast]) -> str:
    """The forecast as a person reads it."""
    lines = [
        f"{name}: {counted(part.rows, 'row')}, about {part.tokens:,} tokens, about {_size(part.bytes)}"
        for name, part in forecast.items()
    ]
    total = sum(part.bytes for part in forecast.values())
    return "\n".join([*lines, f"in all about {_size(total)}"])


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
