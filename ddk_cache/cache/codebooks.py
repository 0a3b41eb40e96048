"""The groups of tables at the root of a cache: the codec's codebooks and the tokenizer's vocabulary.

A table is an array of one or two dimensions in one shard, stored like rows. Its group's document, written
last, lists every table with its type, its shape and the sha256 of its values.
"""

import re
from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ddk_cache.errors import CacheError, DamagedError
from ddk_cache.format import layout, shards, zarr_documents
from ddk_cache.format.codebook import Codebook
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.lock import LockedStorage
from ddk_cache.storage.storage import Storage
from ddk_cache.util.configuration import first_problem

Tables = Mapping[str, NDArray[Any]]


def read_codebook(storage: Storage, teacher_index: int = 0) -> Codebook | None:
    """Return a teacher's codebook, from either copy; None before it is written.

    Raises DamagedError if both copies are damaged.
    """
    problem: DamagedError | None = None
    for group in layout.codebook_groups(teacher_index):
        try:
            tables = _read(storage, group)
            if tables is not None:
                return Codebook.from_arrays(tables)
        except DamagedError as error:
            problem = problem or error
        except ValueError as error:
            problem = problem or DamagedError(f"{storage.url}/{group}: is damaged: {error}")
    if problem is not None:
        raise problem
    return None


def usable_codebook(storage: Storage, teacher_index: int = 0) -> Codebook | None:
    """Return a teacher's codebook; None also if both copies are damaged."""
    try:
        return read_codebook(storage, teacher_index)
    except DamagedError:
        return None


def write_codebook(storage: LockedStorage, codebook: Codebook, teacher_index: int = 0) -> None:
    """Write both copies of a teacher's codebook."""
    tables = codebook.arrays()
    groups = layout.codebook_groups(teacher_index)
    list(storage.map(lambda group: storage.update(_objects(group, tables)), groups))


def drop_codebook(storage: LockedStorage, teacher_index: int = 0) -> None:
    """Delete a teacher's codebook, so that it is fitted again."""
    for group in layout.codebook_groups(teacher_index):
        storage.delete(f"{group}/zarr.json")


def codebook_digest(codebook: Codebook) -> str:
    """Return the sha256 of the tables' types, shapes and values, as in their group's document."""
    return layout.digest(_listing(codebook.arrays()))


def read_vocabulary(storage: Storage, tokenizer_hash: str) -> Vocabulary:
    """Return the vocabulary of the teacher's tokenizer.

    Raises DamagedError if it is missing, damaged, or does not match the manifest's ``tokenizer_hash``.
    """
    tables = _read(storage, layout.VOCABULARY) or {}
    vocabulary = Vocabulary.decompress(tables["content"].tobytes()) if "content" in tables else None
    if vocabulary is None or vocabulary.fingerprint() != tokenizer_hash:
        raise DamagedError(f"{storage.url}/{layout.VOCABULARY}: is missing or damaged: run build again")
    return vocabulary


def write_vocabulary(storage: LockedStorage, vocabulary: Vocabulary) -> None:
    """Write the tokenizer's vocabulary, so that a student's can be compared token by token."""
    content = np.frombuffer(vocabulary.compress(), np.uint8)
    storage.update(_objects(layout.VOCABULARY, {"content": content}))


def check_group(storage: Storage, group: str) -> list[str]:
    """Return the problems of a group of tables, a line each."""
    try:
        tables = _read(storage, group)
    except CacheError as error:
        return [str(error)]
    if tables is None:
        return [f"{group}/zarr.json: is missing"]
    return [
        f"{key}: differs from what build writes"
        for key, data in _objects(group, tables).items()
        if key.endswith("/zarr.json") and storage.read(key) != data
    ]


def _read(storage: Storage, group: str) -> Tables | None:
    where = f"{storage.url}/{group}"
    listing = zarr_documents.parse_group(storage.read(f"{group}/zarr.json"), f"{where}/zarr.json")
    if listing is None:
        return None
    tables: dict[str, NDArray[Any]] = {}
    for name, description in listing.items():
        try:
            table = layout.Table.model_validate(description)
            if not re.fullmatch("[a-z_]{1,64}", name):  # it could lead out of the cache
                raise ValueError("is not a valid name of a table")
            tables[name] = _read_table(storage, f"{group}/{name}/c/0/0", table)
        except ValidationError as error:
            raise DamagedError(
                f"{where}: the attributes are wrong: {first_problem(error, layout.Table)}"
            ) from error
        except ValueError as error:
            raise DamagedError(f"{where}/{name!r}: is damaged: {error}") from error
    return tables


def _read_table(storage: Storage, key: str, table: layout.Table) -> NDArray[Any]:
    rows, width = (1, *table.shape)[-2:]
    array = layout.RowArray(table.dtype, width, "zstd")
    most = min(shards.most_object_bytes(array, rows), 2 * layout.MOST_TABLE_BYTES)
    values = shards.decode(storage.read(key, most) or b"", array, rows)
    if sha256(values.tobytes()).hexdigest() != table.sha256:
        raise ValueError("its sha256 does not match its content")
    return values.reshape(table.shape)


def _objects(group: str, tables: Tables) -> dict[str, bytes]:
    """Return every object of a group of tables by key; the document that lists them comes last."""
    objects: dict[str, bytes] = {}
    for name, table in tables.items():
        rows, width = np.atleast_2d(table).shape
        array = layout.RowArray(table.dtype.name, width, "zstd")
        objects[f"{group}/{name}/c/0/0"] = shards.encode(np.atleast_2d(table), array, rows)
        objects[f"{group}/{name}/zarr.json"] = zarr_documents.row_array(array, rows, rows)
    return objects | {f"{group}/zarr.json": zarr_documents.group(_listing(tables))}


def _listing(tables: Tables) -> dict[str, Any]:
    return {
        name: {
            "dtype": table.dtype.name,
            "shape": list(table.shape),
            "sha256": sha256(np.ascontiguousarray(table).tobytes()).hexdigest(),
        }
        for name, table in tables.items()
    }
