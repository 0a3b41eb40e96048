"""Read a domain's rows with ``datasets``."""

import json
import logging
import re
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_build.config import SourceConfig
from ddk_build.data import files
from ddk_cache.errors import ConfigError

if TYPE_CHECKING:
    import pyarrow as pa
    from datasets import Dataset, IterableDataset

BATCH_ROWS = 256  # few enough for rows of a megabyte; a part of short rows has many batches
PART_BYTES = 1 << 20  # a tokenizer takes about a second
COLUMN_KEYS = (
    "; other keys: text_column, messages_column (conversations), prompt_column and completion_column"
)
PATH_HINT = "; path is a folder, a file, a glob, a hub id, or json, parquet, csv or text with data_files"
NO_ROWS = ("No columns to parse from file", "corresponds to no data")  # of a csv without lines, or with one
CSV_HINT = "; save it with commas between the columns (.tsv: tabs) and quotes around a text that holds them"

Row = dict[str, Any] | None
"""A row by column; None if it is not valid UTF-8."""


@dataclass(frozen=True)
class Part:
    """Consecutive rows in Arrow's form."""

    first: int
    """Index of the first row."""
    table: "pa.Table"
    replaced: bool
    """Bytes that are not UTF-8 were read as U+FFFD."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the table in Arrow's stream format; otherwise a slice takes its whole buffers along."""
        import pyarrow as pa

        file = pa.BufferOutputStream()
        with pa.ipc.new_stream(file, self.table.schema) as stream:
            stream.write_table(self.table)
        return _unpickle_part, (self.first, bytes(file.getvalue()), self.replaced)

    def rows(self, domain: SourceConfig) -> list[Row]:
        """Return the rows with the configured columns, and ``tools`` if the dataset has it."""
        rows = _decode(self.table)
        if self.replaced:
            column = domain.columns[0]
            return [None if "\ufffd" in str(row and row[column]) else row for row in rows]
        return rows


def _unpickle_part(first: int, table: bytes, replaced: bool) -> Part:
    import pyarrow as pa

    return Part(first, pa.ipc.open_stream(table).read_all(), replaced)


def read(name: str, domain: SourceConfig, skip: int) -> Iterator[Part]:
    """Yield the domain's rows from index ``skip`` on, in the dataset's order, ``PART_BYTES`` at a time.

    Raises ConfigError, which names the domain, if the source does not exist or cannot be read, or lacks a
    column.
    """
    with _reading(name, domain):
        dataset, replaced = _load(domain)
        if not domain.streaming and skip >= len(dataset):
            if skip > len(dataset):
                raise files.FilesError(f"{skip} rows of it were read, and it has {len(dataset)} now")
            return  # a build may be killed after its last row, and ``datasets`` cannot skip all rows
        batches = dataset.skip(skip).with_format("arrow").iter(batch_size=BATCH_ROWS)
        tables = _parts(_columns(name, domain, batch) for batch in batches)
    while True:
        with _reading(name, domain):  # not around the yield: it changes the state of the process
            table = next(tables, None)
        if table is None:
            return
        yield Part(skip, table, replaced)
        skip += len(table)


def _columns(name: str, domain: SourceConfig, table: "pa.Table") -> "pa.Table":
    for column in domain.columns:
        if column not in table.column_names:
            names = ", ".join(table.column_names)
            hint = "" if domain.columns != ["text"] else COLUMN_KEYS
            if len(table.column_names) == 1 and re.search("[;\t|]", names):  # of a .csv, by its header
                hint = CSV_HINT
            raise ConfigError(f"domains.{name}: there is no column {column!r}; there are: {names}{hint}")
    columns = dict.fromkeys([*domain.columns, "tools"])  # a key may name the column of another
    return table.select([column for column in columns if column in table.column_names])


def _parts(tables: Iterable["pa.Table"]) -> Iterator["pa.Table"]:
    """Yield the tables' rows in order, split and joined to about PART_BYTES, at least a row."""
    import pyarrow as pa

    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        if waiting and (size + table.nbytes > PART_BYTES or table.schema != waiting[0].schema):
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
        if table.nbytes > PART_BYTES:
            count = max(1, len(table) * PART_BYTES // table.nbytes)
            yield from (table.slice(start, count) for start in range(0, len(table), count))
        else:
            waiting.append(table)
            size += table.nbytes
    if waiting:
        yield pa.concat_tables(waiting)


def count_rows(name: str, domain: SourceConfig) -> int | None:
    """Return how many rows the dataset has; None if only reading all of it would show that (streaming)."""
    with _reading(name, domain):
        dataset, _ = _load(domain)
        return None if domain.streaming else len(dataset)


def _load(domain: SourceConfig) -> tuple["Dataset | IterableDataset", bool]:
    """Return the dataset, and whether bytes that are not UTF-8 are read as U+FFFD."""
    from datasets import load_dataset, load_dataset_builder
    from datasets.packaged_modules.csv.csv import CsvConfig
    from datasets.packaged_modules.parquet.parquet import ParquetConfig
    from datasets.packaged_modules.text.text import TextConfig
    from pyarrow.dataset import ParquetFragmentScanOptions

    if files.is_saved(domain.path):
        return _load_saved(domain), False
    source = files.find(domain)
    config = load_dataset_builder(**source).config
    # By default, these two readers fail at the first byte of a file that is not UTF-8.
    replaced = isinstance(config, TextConfig | CsvConfig)
    if replaced:
        source["encoding_errors"] = "replace"
    if isinstance(config, CsvConfig):
        source["index_col"] = False  # by default, pandas takes columns without a header for an index
    if isinstance(config, ParquetConfig):  # by default, pages are not compared with their checksums
        source["fragment_scan_options"] = ParquetFragmentScanOptions(page_checksum_verification=True)
    if isinstance(config, TextConfig):
        source["sample_by"] = domain.sample_by
    return load_dataset(**source, split=domain.split, streaming=domain.streaming), replaced


def _load_saved(domain: SourceConfig) -> "Dataset | IterableDataset":
    """Return the dataset of a folder that ``save_to_disk`` wrote."""
    from datasets import load_from_disk

    for key in ("name", "data_files", "data_dir", "revision"):
        if getattr(domain, key) is not None:
            raise files.FilesError(f"{key}: does nothing with a folder by save_to_disk; leave it out")
    saved = load_from_disk(domain.path)
    if isinstance(saved, dict):
        if domain.split not in saved:
            raise files.FilesError(f"split: there is no {domain.split!r}; there are: {', '.join(saved)}")
        saved = saved[domain.split]
    elif domain.split not in ("train", saved.split):  # "train" is the default
        raise files.FilesError("split: the folder holds one dataset, without splits; leave it out")
    return saved.to_iterable_dataset() if domain.streaming else saved


def _decode(table: "pa.Table") -> list[Row]:
    from datasets import Features
    from datasets.formatting import PythonFormatter

    try:
        batch = PythonFormatter(Features.from_arrow_schema(table.schema)).format_batch(table)
    except UnicodeDecodeError:
        if len(table) == 1:
            return [None]
        half = len(table) // 2
        return [*_decode(table.slice(0, half)), *_decode(table.slice(half))]
    return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


@contextmanager
def _reading(name: str, domain: SourceConfig) -> Iterator[None]:
    """Raise errors of ``datasets`` and pandas as one line, and let them print nothing but progress bars."""
    import datasets
    from pandas.errors import ParserWarning

    log = _LastError()
    logger = logging.getLogger("datasets")
    handlers, logger.handlers = logger.handlers, [log]
    hide_bars = not (sys.stderr.isatty() or datasets.utils.are_progress_bars_disabled())
    if hide_bars:
        datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Length of header", ParserWarning)
            yield
    except ConfigError:
        raise
    except files.FilesError as error:
        raise ConfigError(f"domains.{name}: {error}") from error
    except Exception as error:  # builders raise what their parsers raise
        reason = _reason(error, log.message, domain)
        raise ConfigError(f"domains.{name}: cannot read {domain.path!r}: {reason}") from error
    finally:
        logger.handlers = handlers
        if hide_bars:
            datasets.enable_progress_bars()


def _reason(error: Exception, logged: str, domain: SourceConfig) -> str:
    """Return why a source cannot be read; ``datasets`` logs a file's name and raises an error without it."""
    reason = logged or str(error.__cause__ or error)
    if any(sign in reason for sign in NO_ROWS) or not reason:
        return "it holds no rows"
    reason = _broken_line(reason) or " ".join(reason.split())
    if "Error tokenizing data" in reason or "Length of header" in reason:
        reason += CSV_HINT
    if isinstance(error, OSError):
        if not Path(domain.path).exists() and domain.path not in files.FORMATS:
            reason = f"it is not here, and as a hub id: {reason}"
        reason += PATH_HINT
        if domain.data_files is not None and Path(domain.path).is_dir():
            reason += f"; text that is not .txt by a glob, such as '{Path(domain.path) / '**' / '*.md'}'"
    return reason


def _broken_line(reason: str) -> str | None:
    """Return which line of a JSON lines file is invalid; ``datasets`` counts from 0 in a part of the file."""
    import fsspec

    named = re.match(r"Failed to load JSON from file '(.+\.(?:jsonl|ndjson)\b.*?)' with error", reason)
    if not named:
        return None
    file = named[1].rpartition("::")[2]  # of gzip://a.jsonl::folder/a.jsonl.gz
    with fsspec.open(named[1], "rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            try:
                if not line.isspace():
                    json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError:
                return f"line {line_number} of {file} is not UTF-8: save the file as UTF-8"
            except ValueError as error:
                return f"line {line_number} of {file} is not JSON ({error}): correct or remove it"
    return None


class _LastError(logging.Handler):
    """Keeps the message of the last logged error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.message = ""

    def emit(self, record: logging.LogRecord) -> None:
        self.message = record.getMessage()
