"""The small groups at a cache's root: the codec's codebooks and the tokenizer's vocabulary.

A table is an array of one or two dimensions in one shard, stored like rows. Its group's document, written
last, lists every table with its type, shape and the sha256 of its values.
"""

from collections.abc import Mapping
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from ddk_cache import layout, metadata, shards
from ddk_cache.codec import Codebook
from ddk_cache.configuration import first_problem
from ddk_cache.errors import CacheError, UnreachableError
from ddk_cache.lock import LockedStorage
from ddk_cache.storage import Storage
from ddk_cache.tokens import Vocabulary

Tables = Mapping[str, NDArray[Any]]


def read_codebook(storage: Storage, teacher: int = 0) -> Codebook | None:
    """The tables that the codec needs, from either copy; None before they are made.

    Raises
    ------
    CacheError
        They are damaged, both times.
    """
    problem: CacheError | None = None
    for group in layout.codebook_groups(teacher):
        try:
            tables = _read(storage, group)
            if tables is not None:
                return Codebook.from_arrays(tables)
        except CacheError as error:
            problem = problem or error
        except ValueError as error:
            problem = problem or CacheError(f"{storage.url}/{group}: is damaged: {error}")
    if problem is not None:
        raise problem
    return None


def usable_codebook(storage: Storage, teacher: int = 0) -> Codebook | None:
    """The same; None too where both copies are damaged."""
    try:
        return read_codebook(storage, teacher)
    except UnreachableError:
        raise
    except CacheError:
        return None


def write_codebook(storage: LockedStorage, codebook: Codebook, teacher: int = 0) -> None:
    """Keep the codec's tables, twice."""
    tables = codebook.arrays()
    groups = layout.codebook_groups(teacher)
    list(storage.map(lambda group: storage.update(_objects(group, tables)), groups))


def drop_codebook(storage: LockedStorage, teacher: int = 0) -> None:
    """Let there be none, as before it was learnt."""
    for group in layout.codebook_groups(teacher):
        storage.delete(f"{group}/zarr.json")


def codebook_digest(codebook: Codebook) -> str:
    """sha256 of its content: the tables' types, shapes and values. Its groups' documents have the same."""
    return layout.digest(_listing(codebook.arrays()))


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
        raise CacheError(f"{storage.url}/{layout.VOCABULARY}: is missing or damaged: run build again")
    return vocabulary


def write_vocabulary(storage: LockedStorage, vocabulary: Vocabulary) -> None:
    """Keep the tokenizer's content, so that a student's can be compared token by token."""
    storage.update(_objects(layout.VOCABULARY, {"content": np.frombuffer(vocabulary.pack(), np.uint8)}))


def check_group(storage: Storage, group: str, *, sealed: bool) -> list[str]:
    """What is wrong with a group of tables, each by its key; ``sealed``: their documents carry digests."""
    try:
        tables = _read(storage, group)
    except CacheError as error:
        return [str(error)]
    if tables is None:
        return [f"{group}/zarr.json: is missing"]
    documents = {key: data for key, data in _objects(group, tables).items() if key.endswith("/zarr.json")}
    if not sealed:
        del documents[f"{group}/zarr.json"]
    return [
        f"{key}: is not what it should be" for key, data in documents.items() if storage.read(key) != data
    ]


def _read(storage: Storage, group: str) -> Tables | None:
    where = f"{storage.url}/{group}"
    listed = metadata.parse_group(storage.read(f"{group}/zarr.json"), f"{where}/zarr.json")
    if listed is None:
        return None
    tables: dict[str, NDArray[Any]] = {}
    for name, described in listed.items():
        try:
            table = layout.Table.model_validate(described)
            rows, width = (1, *table.shape)[-2:]
            array = layout.RowArray(table.dtype, width, "zstd")
            key = f"{group}/{layout.table_name(name)}/c/0/0"
            data = storage.read(key, shards.most_object_bytes(array, rows)) or b""
            found = shards.unpack(data, array, rows, rows)
            if table.sha256 is not None and sha256(found.tobytes()).hexdigest() != table.sha256:
                raise ValueError("its content is not what its sha256 says")
        except ValidationError as error:
            raise CacheError(
                f"{where}: the attributes are wrong: {first_problem(error, layout.Table)}"
            ) from error
        except ValueError as error:
            raise CacheError(f"{where}/{name!r}: is damaged: {error}") from error
        tables[name] = found.reshape(table.shape)
    return tables


def _objects(group: str, tables: Tables) -> dict[str, bytes]:
    """Everything that a group of tables has, by key; the document that lists them comes last."""
    found: dict[str, bytes] = {}
    for name, table in tables.items():
        rows, width = np.atleast_2d(table).shape
        array = layout.RowArray(table.dtype.name, width, "zstd")
        found[f"{group}/{name}/c/0/0"] = shards.pack(np.atleast_2d(table), array, rows)
        found[f"{group}/{name}/zarr.json"] = metadata.row_array(array, rows, rows)
    return found | {f"{group}/zarr.json": metadata.group(_listing(tables))}


def _listing(tables: Tables) -> dict[str, Any]:
    return {
        name: {
            "dtype": table.dtype.name,
            "shape": list(table.shape),
            "sha256": sha256(np.ascontiguousarray(table).tobytes()).hexdigest(),
        }
        for name, table in tables.items()
    }
