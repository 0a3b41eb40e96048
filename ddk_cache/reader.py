"""Open a cache, check it, read rows. numpy only; nothing here knows of training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddk_cache import codec, layout, shards
from ddk_cache.errors import CacheError, IncompleteCacheError
from ddk_cache.records import (
    existing_manifest,
    finished_rows,
    read_state,
    split_arrays,
)
from ddk_cache.storage import Storage
from ddk_cache.tables import read_codebook, read_vocabulary
from ddk_cache.tokens import Vocabulary

if TYPE_CHECKING:
    import zarr

ROWS_AT_ONCE = 16  # read by an iteration over a split


@dataclass(frozen=True)
class Rows:
    """Some rows of a split. Position t holds the distribution over token t+1, given its document up to t.

    Where ``loss_mask`` is False there is no entry, no tail (-inf) and a ``label_logprob`` of 0.
    """

    tokens: NDArray[np.int32]
    """[n, S]; 0 in the padding."""
    segments: NDArray[np.uint16]
    """[n, S]; 0 = padding, 1.. = the document's number in its row."""
    loss_mask: NDArray[np.bool_]
    """[n, S]; position t has a label, the token at t+1, and it counts."""
    label_logprob: NDArray[np.float32]
    """[n, S]; log p(token t+1) in nats at temperature 1, exact."""
    ids: NDArray[np.int32] | None = None
    """[n, S, E]; best first, -1 where an entry is absent."""
    logprobs: NDArray[np.float32] | None = None
    """[n, S, E]; nats, of the target at its temperature; -inf where absent."""
    tail_logprob: NDArray[np.float32] | None = None
    """[n, S]; log of the mass outside the entries; -inf where none is left."""


class Cache(Mapping[str, "Domain"]):
    """A cache, opened for reading; a mapping from a domain's name to its two splits."""

    def __init__(self, storage: Storage, manifest: layout.Manifest, domains: Mapping[str, "Domain"]) -> None:
        self.storage = storage
        self.manifest = manifest
        self._domains = domains

    @property
    def domains(self) -> tuple[str, ...]:
        """Names, in the configuration's order."""
        return tuple(self._domains)

    @property
    def seq_length(self) -> int:
        """Tokens a row, S."""
        return self.manifest.seq_length

    @property
    def vocab_size(self) -> int:
        """Logits a position at the teacher, padding included."""
        return self.manifest.vocab_size

    @property
    def target(self) -> layout.Target:
        return self.manifest.target

    @property
    def teacher(self) -> layout.TeacherInfo:
        """The first; each domain has its own."""
        return self.manifest.teachers[0]

    @property
    def tokenizer_hash(self) -> str:
        """sha256 of the token -> id map and the special tokens."""
        return self.manifest.tokenizer_hash

    @cached_property
    def vocabulary(self) -> Vocabulary:
        """The teacher's tokenizer by content; read when first asked for."""
        return read_vocabulary(self.storage, self.tokenizer_hash)

    @property
    def complete(self) -> bool:
        """Whether every shard of every domain is there."""
        return all(domain.complete for domain in self._domains.values())

    def __getitem__(self, name: str) -> "Domain":
        return self._domains[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._domains)

    def __len__(self) -> int:
        return len(self._domains)

    def as_zarr(self) -> "zarr.Group":
        """The arrays as they are stored (docs/format.md), for whoever wants them raw."""
        import zarr
        from zarr.storage import ObjectStore

        return zarr.open_group(ObjectStore(self.storage.store, read_only=True), mode="r", zarr_format=3)


@dataclass(frozen=True)
class Domain:
    """One domain's splits, and how well the teacher knows it."""

    name: str
    teacher: layout.TeacherInfo
    state: layout.DomainState
    train: "SplitReader"
    validation: "SplitReader"

    @property
    def complete(self) -> bool:
        return self.state.complete

    @property
    def teacher_cross_entropy(self) -> float:
        """The teacher's mean loss over the validation split, in nats a label.

        Raises
        ------
        CacheError
            The validation split is not finished.
        """
        if self.state.teacher_cross_entropy is None:
            raise CacheError(f"domain {self.name!r}: the validation split is not finished; run build again")
        return self.state.teacher_cross_entropy

    def split(self, name: layout.Split) -> "SplitReader":
        return self.train if name == "train" else self.validation


class SplitReader:
    """Rows of one split, by number, in any order. Safe to call from several threads."""

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        domain: str,
        name: layout.Split,
        rows: NDArray[np.int64] | int,
        codebook: codec.Codebook | None,
    ) -> None:
        self.name = name
        self._storage = storage
        self._manifest = manifest
        self._domain = domain
        self._codebook = codebook
        # All rows, or the numbers of those that an unfinished split has.
        self._rows = rows
        self._arrays = split_arrays(manifest, name)
        self._indices: dict[tuple[str, int], NDArray[np.uint32]] = {}

    @property
    def codebook(self) -> codec.Codebook | None:
        """The tables that the entries are written with; None where no entry was written yet."""
        return self._codebook

    def __len__(self) -> int:
        return self._rows if isinstance(self._rows, int) else len(self._rows)

    def read(self, rows: ArrayLike, *, targets: bool = True) -> Rows:
        """Read rows [n] by number, in the given order; repeats are allowed.

        ``targets=False`` leaves ids, logprobs and tail_logprob None and does not touch their bytes.

        Raises
        ------
        IndexError
            A row's number is not in 0..len-1.
        CacheError
            Bytes are damaged or missing; the message names the shard.
        """
        wanted = np.asarray(rows, np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"rows must be a list of row numbers, not of shape {wanted.shape}")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"{self._domain}/{self.name} has rows 0 to {len(self) - 1}, not {wanted.tolist()}"
            )
        physical = wanted if isinstance(self._rows, int) else self._rows[wanted]
        entries = codec.row_arrays(self._manifest.target, self._manifest.seq_length)
        targets = targets and self._manifest.has_targets(self.name)
        names = [name for name in self._arrays if targets or name not in entries]
        found = self._read_arrays(names, physical)
        basic = Rows(
            tokens=found["tokens"].astype(np.int32),
            segments=found["segments"],
            loss_mask=found["loss_mask"].astype(np.bool_),
            label_logprob=found["label_logprob"],
        )
        if not targets:
            return basic
        if self._codebook is None:
            raise CacheError(f"{self._storage.url}/{layout.CODEBOOK}: the codebook is missing")
        try:
            ids, logprobs, tail = codec.decode(
                {name: found[name] for name in entries},
                self._codebook,
                self._manifest.target,
                self._manifest.seq_length,
            )
        except ValueError as error:
            raise CacheError(f"{self._storage.url}: {self._domain}/{self.name}: {error}") from error
        return Rows(basic.tokens, basic.segments, basic.loss_mask, basic.label_logprob, ids, logprobs, tail)

    def _read_arrays(self, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The named arrays' rows: [n, width] each."""
        shard, inner = np.divmod(rows, self._manifest.shard_rows)
        where = list(zip(shard.tolist(), inner.tolist(), strict=True))
        needed = sorted({number for number, _ in where})
        self._load_indices([(name, number) for name in names for number in needed])
        places = [(name, number, row) for name in names for number, row in where]
        spans = [self._indices[name, a][b].tolist() for name, a, b in places]
        ranges = [
            (self._key(name, a), start, end) for (name, a, _), (start, end) in zip(places, spans, strict=True)
        ]
        arrays = {
            name: np.empty((len(rows), self._arrays[name].width), self._arrays[name].dtype) for name in names
        }
        for at, (place, chunk) in enumerate(zip(places, self._storage.read_ranges(ranges), strict=True)):
            name, number, _ = place
            try:
                arrays[name][at % len(rows)] = shards.unpack_row(chunk, self._arrays[name])
            except ValueError as error:
                raise CacheError(f"{self._storage.url}/{self._key(name, number)}: {error}") from error
        return arrays

    def _load_indices(self, wanted: Sequence[tuple[str, int]]) -> None:
        """Fetch the shards' indices that are not known yet (8 bytes a row and array are kept)."""
        missing = [place for place in wanted if place not in self._indices]
        if not missing:
            return
        rows = self._manifest.shard_rows
        tails = self._storage.read_ranges(
            [(self._key(*place), -shards.tail_length(rows), 0) for place in missing]
        )
        for place, tail in zip(missing, tails, strict=True):
            try:
                index = shards.parse_index(tail, rows)
            except ValueError as error:
                raise CacheError(f"{self._storage.url}/{self._key(*place)}: {error}") from error
            self._indices[place] = index.astype(np.uint32)

    def _key(self, name: str, shard: int) -> str:
        return layout.shard_key(self._domain, self.name, name, shard)

    def __getitem__(self, row: int | slice) -> Rows:
        """``split[5]`` is one row, without the first dimension: [S] and [S, E]; ``split[2:9]`` is several."""
        if isinstance(row, slice):
            return self.read(range(*row.indices(len(self))))
        return _one(self.read([row + len(self) if row < 0 else row]))

    def __iter__(self) -> Iterator[Rows]:
        """Row after row, as ``split[row]``; read some at a time."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            rows = self[start : start + ROWS_AT_ONCE]
            for place in range(len(rows.tokens)):
                yield _one(rows, place)


def _one(rows: Rows, place: int = 0) -> Rows:
    columns: list[Any] = [None if values is None else values[place] for values in vars(rows).values()]
    return Rows(*columns)


def open_cache(url: str, *, allow_incomplete: bool = False) -> Cache:
    """Open a cache by folder or URL.

    Parameters
    ----------
    url
        A folder or file:// s3:// gs:// az://.
    allow_incomplete
        Take an unfinished cache too: a train split then has the rows of its finished shards.

    Raises
    ------
    CacheNotFoundError
        There is no cache there.
    IncompleteCacheError
        A shard is missing, and ``allow_incomplete`` is not set.
    CacheError
        The cache is damaged or of a version not known here.
    """
    storage = Storage(str(url))
    manifest = existing_manifest(storage)
    codebook = read_codebook(storage)
    domains: dict[str, Domain] = {}
    for source in manifest.domains:
        state = read_state(storage, source.name)
        complete = state is not None and state.complete
        if not complete and not allow_incomplete:
            raise IncompleteCacheError(
                f"{url}: domain {source.name!r} is not finished; run build again, "
                "or set allow_incomplete: true to use what is there"
            )
        if state is None:
            continue
        splits: dict[layout.Split, SplitReader] = {}
        for name in layout.SPLITS:
            total = state.split(name).rows
            rows = total if complete else finished_rows(storage, manifest, source.name, name, total)
            splits[name] = SplitReader(storage, manifest, source.name, name, rows, codebook)
        domains[source.name] = Domain(
            source.name, manifest.teachers[source.teacher], state, splits["train"], splits["validation"]
        )
    return Cache(storage, manifest, domains)
