"""The two small groups at a cache's root: the codec's codebook and the tokenizer's vocabulary.

A table is an array of one or two dimensions in one shard, stored like rows. Its group's document, written
last, lists every table with its type, shape and checksum.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ddk_cache import layout, metadata, shards
from ddk_cache.codec import Codebook
from ddk_cache.errors import CacheError
from ddk_cache.lock import LockedStorage
from ddk_cache.storage import Storage
from ddk_cache.tokens import Vocabulary

Tables = Mapping[str, NDArray[Any]]


def read_codebook(storage: Storage) -> Codebook | None:
    """The tables that the codec needs; None before they are made.

    Raises
    ------
    CacheError
        They are damaged.
    """
    tables = _read(storage, layout.CODEBOOK)
    try:
        return None if tables is None else Codebook.from_arrays(tables)
    except ValueError as error:
        raise CacheError(f"{storage.url}/{layout.CODEBOOK}: is damaged: {error}") from error


def write_codebook(storage: LockedStorage, codebook: Codebook) -> None:
    """Keep the codec's tables.

    Raises
    ------
    CacheError
        Others are there: what was written with them could not be read with these.
    """
    document = _document(codebook.arrays())
    before = storage.read(f"{layout.CODEBOOK}/zarr.json")
    if before not in (None, document):
        raise CacheError(
            f"{storage.url}/{layout.CODEBOOK}: is damaged, and the teacher's answers now give another "
            "codebook: build into a new cache"
        )
    _write(storage, layout.CODEBOOK, codebook.arrays())


def read_vocabulary(storage: Storage, tokenizer_hash: str) -> Vocabulary:
    """The content of the teacher's tokenizer.

    Raises
    ------
    CacheError
        It is missing, damaged or not the one that the manifest tells of.
    """
    tables = _read(storage, layout.VOCABULARY) or {}
    vocabulary = Vocabulary.unpack(tables["content"].tobytes()) if "content" in tables else None
    if vocabulary is None or vocabulary.fingerprint() != tokenizer_hash:
        raise CacheError(f"{storage.url}/{layout.VOCABULARY}: is missing or damaged")
    return vocabulary


def write_vocabulary(storage: LockedStorage, vocabulary: Vocabulary) -> None:
    """Keep the tokenizer's content, so that a student's can be compared token by token."""
    _write(storage, layout.VOCABULARY, {"content": np.frombuffer(vocabulary.pack(), np.uint8)})


def check_documents(storage: Storage, group: str) -> list[str]:
    """Keys of the group's tables whose zarr.json is not what it should be; the tables are sound."""
    return [
        f"{group}/{name}/zarr.json"
        for name, table in (_read(storage, group) or {}).items()
        if storage.read(f"{group}/{name}/zarr.json") != metadata.row_array(*_stored_as(table))
    ]


def _read(storage: Storage, group: str) -> Tables | None:
    where = f"{storage.url}/{group}"
    listed = layout.parse_group(storage.read(f"{group}/zarr.json"), where)
    if listed is None:
        return None
    tables: dict[str, NDArray[Any]] = {}
    for name, described in listed.items():
        try:
            table = layout.Table.model_validate(described)
            rows, width = (1, *table.shape)[-2:]
            data = storage.read(f"{group}/{layout.table_name(name)}/c/0/0") or b""
            if shards.checksum(data) != table.checksum:
                raise ValueError("the checksum does not match")
            found = shards.unpack(data, layout.RowArray(table.dtype, width, "zstd"), rows, rows)
        except ValidationError as error:
            raise CacheError(f"{where}: the attributes are wrong") from error
        except ValueError as error:
            raise CacheError(f"{where}/{name!r}: is damaged: {error}") from error
        tables[name] = found.reshape(table.shape)
    return tables


def _write(storage: LockedStorage, group: str, tables: Tables) -> None:
    for name, table in tables.items():
        storage.write(f"{group}/{name}/c/0/0", _packed(table))
        storage.write(f"{group}/{name}/zarr.json", metadata.row_array(*_stored_as(table)))
    storage.write(f"{group}/zarr.json", _document(tables))


def _document(tables: Tables) -> bytes:
    return metadata.group(
        {
            name: {
                "dtype": table.dtype.name,
                "shape": list(table.shape),
                "checksum": shards.checksum(_packed(table)),
            }
            for name, table in tables.items()
        }
    )


def _packed(table: NDArray[Any]) -> bytes:
    array, rows, _ = _stored_as(table)
    return shards.pack(np.atleast_2d(table), array, rows)


def _stored_as(table: NDArray[Any]) -> tuple[layout.RowArray, int, int]:
    """The array over rows, its rows, and the rows of its one shard."""
    rows, width = np.atleast_2d(table).shape
    return layout.RowArray(table.dtype.name, width, "zstd"), rows, rows
