"""Write a cache's training rows as parquet files for other trainers; docs/export.md describes them.

Each shard becomes one file, which is complete or missing, so that an interrupted export resumes.
"""

import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ddk_cache.cache.reader import Cache
from ddk_cache.cache.rows import Rows
from ddk_cache.errors import CacheError, ConfigError, counted
from ddk_cache.export import formats as export_formats
from ddk_cache.format import layout
from ddk_cache.util.durable import is_staged, make_folder, open_regular, remove_staged, replacing, write

FORMATS: dict[str, Callable[[Rows], pa.Table]] = {
    "axolotl": export_formats.axolotl,
    "distillkit": export_formats.distillkit,
    "parquet": export_formats.plain,
}
NOTE = "export.json"  # describes the export in its folder
SAMPLE_ROWS = 8  # of each domain, encoded for the forecast
MAX_ENTRIES = 1 << 22  # decoded at a time: about 100 MiB of memory


@dataclass(frozen=True)
class Forecast:
    """The expected size of a domain's files."""

    rows: int
    tokens: int
    bytes: int


class _File(NamedTuple):
    path: Path
    domain: str
    rows: range  # indices in the domain's train split


class Export:
    """An export that is ready to be written.

    Parameters
    ----------
    cache
        An open cache.
    folder
        The folder for the files ``<domain>/00000.parquet`` and so on.
    form
        A key of ``FORMATS``.
    domains
        Domains to export; none means all.
    rows
        Export at most the first ``rows`` of each domain; None exports all.

    Raises
    ------
    ConfigError
        A domain does not exist, or the folder holds another export or other files.
    """

    def __init__(
        self, cache: Cache, folder: Path, form: str, domains: Sequence[str] = (), rows: int | None = None
    ) -> None:
        for name in domains:
            if name not in cache:
                raise ConfigError(f"--domain {name}: the cache has {', '.join(cache.domains)}")
        self._cache, self._folder, self._table = cache, folder, FORMATS[form]
        self.rows = {
            name: min(len(cache[name].train), rows or len(cache[name].train))
            for name in cache.domains
            if name in domains or not domains
        }
        self._batch = max(1, MAX_ENTRIES // (cache.seq_length * max(cache.target.width, 1)))  # rows
        manifest = hashlib.sha256(cache.manifest.model_dump_json().encode()).hexdigest()
        # When an unfinished cache finishes an earlier shard, its first rows are others.
        step = cache.manifest.shard_rows
        shards = {name: cache[name].train.shards[: layout.shards(n, step)] for name, n in self.rows.items()}
        digests = {"manifest_sha256": manifest, "shards_sha256": layout.digest(shards)}
        self._note = json.dumps({"format": form, "rows": self.rows} | digests)
        note = folder / NOTE
        if note.is_file() and note.read_text(encoding="utf-8") != self._note:
            raise ConfigError(
                f"{folder}: holds an export of another cache, format or choice of rows, or of fewer finished "
                "shards; name a new folder"
            )
        others = [path for path in folder.iterdir() if not is_staged(path.name)] if folder.is_dir() else []
        if others and not note.is_file():
            raise ConfigError(f"{folder}: is not empty and holds no export; name a new folder")

    def forecast(self) -> dict[str, Forecast]:
        """Return the rows of each domain, and its tokens and bytes estimated from a few rows."""
        forecasts = {}
        for name, rows in self.rows.items():
            size = min(rows, SAMPLE_ROWS, self._batch)
            indices = np.unique(np.linspace(0, max(rows - 1, 0), size).astype(int))
            sample = self._cache[name].train.read(indices)
            file = io.BytesIO()
            pq.write_table(self._table(sample), file, compression="zstd")
            scale = rows / max(len(indices), 1)
            tokens = int((sample.segments > 0).sum())
            forecasts[name] = Forecast(rows, round(tokens * scale), round(file.tell() * scale))
        return forecasts

    def write(self) -> Iterator[int]:
        """Write the missing files; yield the number of rows of each file, existing ones included.

        Raises CacheError if the cache cannot be read or the disk has too little space.
        """
        make_folder(self._folder)
        remove_staged(self._folder.rglob("*#*"))
        files = [(file, _is_complete(file.path)) for file in self._files()]
        missing = sum(len(file.rows) for file, is_complete in files if not is_complete)
        expected = sum(domain.bytes for domain in self.forecast().values())
        needed = expected * missing // max(sum(self.rows.values()), 1)
        free = shutil.disk_usage(self._folder).free
        if needed > free:
            raise CacheError(f"{self._folder}: needs about {needed:,} bytes, but {free:,} are free")
        write(self._folder / NOTE, self._note)
        for file, is_complete in files:
            if not is_complete:
                self._write_file(file)
            yield len(file.rows)

    def _files(self) -> Iterator[_File]:
        step = self._cache.manifest.shard_rows
        for name, rows in self.rows.items():
            for start in range(0, rows, step):
                path = self._folder / name / f"{start // step:05}.parquet"
                yield _File(path, name, range(start, min(start + step, rows)))

    def _write_file(self, file: _File) -> None:
        make_folder(file.path.parent)
        if file.path.parent.is_symlink():
            raise CacheError(f"{file.path.parent}: is a link, where nothing is written; name a new folder")
        split = self._cache[file.domain].train
        starts = range(0, len(file.rows), self._batch)
        tables = (self._table(split.read(file.rows[start : start + self._batch])) for start in starts)
        first = next(tables)
        options: Any = {"schema": first.schema, "compression": "zstd"}
        with replacing(file.path) as staged, pq.ParquetWriter(staged, **options) as parquet:
            for table in chain([first], tables):
                parquet.write_table(table)


def _is_complete(path: Path) -> bool:
    """Return whether a parquet file has its footer, which is written last."""
    try:
        with open(open_regular(path, os.O_RDONLY), "rb") as file:
            pq.read_metadata(file)
    except (OSError, pa.ArrowInvalid):
        return False
    return True


def as_text(forecasts: dict[str, Forecast]) -> str:
    """Return a forecast as text, one line per domain."""
    lines = [
        f"{name}: {counted(domain.rows, 'row')}, about {domain.tokens:,} tokens, about {_size(domain.bytes)}"
        for name, domain in forecasts.items()
    ]
    total = sum(domain.bytes for domain in forecasts.values())
    return "\n".join([*lines, f"total: about {_size(total)}"])


def _size(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"
