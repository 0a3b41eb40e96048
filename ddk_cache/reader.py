"""Open a cache, check it, read rows. numpy only; nothing here knows of training."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddk_cache import codec, layout, shards
from ddk_cache.checks import check_entries, check_labels, check_tokens
from ddk_cache.errors import CacheError, IncompleteCacheError
from ddk_cache.marker_cache import MarkerCache, starts
from ddk_cache.records import existing_manifest, finished_shards, read_state, rows_in, split_arrays
from ddk_cache.storage import Storage
from ddk_cache.tables import codebook_digest, read_codebook, read_vocabulary
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
    label_logprob: NDArray[np.float32] | None
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
        total: int,
        markers: MarkerCache,
        codebook: codec.Codebook | None,
        finished: NDArray[np.int64] | None = None,
    ) -> None:
        self.name = name
        self._storage = storage
        self._manifest = manifest
        self._domain = domain
        self._total = total
        self._markers = markers
        self._codebook = codebook
        self._finished = finished  # shards that an unfinished split has; None: all of them
        self._arrays = split_arrays(manifest, name)

    @property
    def codebook(self) -> codec.Codebook | None:
        """The tables that the entries are written with; None where no entry was written yet."""
        return self._codebook

    def __len__(self) -> int:
        if self._finished is None:
            return self._total
        if not len(self._finished):
            return 0
        per_shard = self._manifest.shard_rows
        last = rows_in(self._total, int(self._finished[-1]), per_shard)
        return (len(self._finished) - 1) * per_shard + last

    def read(self, rows: ArrayLike, *, targets: bool = True, labels: bool = True) -> Rows:
        """Read rows [n] by number, in the given order; repeats are allowed.

        ``targets=False`` leaves ids, logprobs and tail_logprob None and does not touch their bytes;
        ``labels=False`` does so with label_logprob.

        Raises
        ------
        IndexError
            A row's number is not in 0..len-1.
        CacheError
            Bytes are damaged, missing, or not those of this place; the message names the shard.
        """
        wanted = np.asarray(rows, np.int64)
        if wanted.ndim != 1:
            raise ValueError(f"rows must be a list of row numbers, not of shape {wanted.shape}")
        if wanted.size and not (wanted.min() >= 0 and wanted.max() < len(self)):
            raise IndexError(
                f"{self._domain}/{self.name} has rows 0 to {len(self) - 1}, not {wanted.tolist()}"
            )
        targets = targets and self._manifest.has_targets(self.name)
        entries = codec.row_arrays(self._manifest.target, self._manifest.seq_length)
        left_out = (set() if targets else set(entries)) | (set() if labels else {"label_logprob"})
        found = self._read_arrays([name for name in self._arrays if name not in left_out], wanted)
        try:
            return self._rows(found, targets)
        except ValueError as error:
            raise CacheError(f"{self._storage.url}: {self._domain}/{self.name}: {error}") from error

    def _rows(self, found: dict[str, NDArray[Any]], targets: bool) -> Rows:
        """What the arrays say, once they agree with each other."""
        mask = found["loss_mask"]
        check_tokens(found["tokens"], found["segments"], mask, self._manifest.vocab_size)
        if "label_logprob" in found:
            check_labels(found["label_logprob"], mask)
        decoded: tuple[NDArray[Any], ...] = ()
        if targets:
            check_entries(found["entries"], mask)
            if self._codebook is None:
                raise ValueError("the codebook is missing")
            decoded = codec.decode(found, self._codebook, self._manifest.target, self._manifest.seq_length)
        return Rows(
            found["tokens"].astype(np.int32),
            found["segments"],
            mask.astype(np.bool_),
            found.get("label_logprob"),
            *decoded,
        )

    def _read_arrays(self, names: Sequence[str], rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
        """The named arrays' rows: [n, width] each."""
        shard, inner = np.divmod(rows, self._manifest.shard_rows)
        if self._finished is not None:
            shard = self._finished[shard]
        columns = {name: at for at, name in enumerate(self._arrays)}
        markers = self._markers.get(self._domain, self.name, np.unique(shard).tolist())
        for number, marker in markers.items():
            expected = rows_in(self._total, number, self._manifest.shard_rows)
            if marker.rows != expected and self._manifest.version > 1:
                raise CacheError(f"{self._place(number)}: has {marker.rows} rows, not {expected}")
        first = {
            (name, number): starts(marker.records["lengths"][columns[name]])
            for number, marker in markers.items()
            for name in names
        }
        places = [
            (name, number, row)
            for name in names
            for number, row in zip(shard.tolist(), inner.tolist(), strict=True)
        ]
        ranges, crcs = [], []
        for name, number, row in places:
            record = markers[number].records[columns[name]]
            start, length = int(first[name, number][row]), int(record["lengths"][row])
            if length > shards.most_bytes(self._arrays[name]):
                raise CacheError(f"{self._place(number)}: {name} has a chunk of {length} bytes")
            ranges.append((layout.shard_key(self._domain, self.name, name, number), start, start + length))
            crcs.append(int(record["crcs"][row]) if self._manifest.version > 1 else None)
        arrays = {
            name: np.empty((len(rows), self._arrays[name].width), self._arrays[name].dtype) for name in names
        }
        chunks = self._storage.read_ranges(ranges)
        for at, ((name, _, _), wanted, chunk, crc) in enumerate(
            zip(places, ranges, chunks, crcs, strict=True)
        ):
            row = arrays[name][at % len(rows)]
            try:
                shards.unpack_into(row, chunk, self._arrays[name], crc)
            except ValueError:
                self._again(row, wanted, self._arrays[name], crc)
        return arrays

    def _again(
        self, row: NDArray[Any], wanted: tuple[str, int, int], array: layout.RowArray, crc: int | None
    ) -> None:
        """Ask once more for a chunk that came damaged: it may have been the connection."""
        (chunk,) = self._storage.read_ranges([wanted])
        try:
            shards.unpack_into(row, chunk, array, crc)
        except ValueError as error:
            raise CacheError(
                f"{self._storage.url}/{wanted[0]}: {error}: run ddk-cache verify, then build again"
            ) from error

    def _place(self, shard: int) -> str:
        return f"{self._storage.url}: {self._domain}/{self.name} shard {shard}"

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
    books = [read_codebook(storage, teacher) for teacher in range(len(manifest.teachers))]
    digests = [None if book is None else codebook_digest(book) for book in books]
    found = {d.name: read_state(storage, manifest, d.name) for d in manifest.domains}
    states = {name: state for name, state in found.items() if state is not None}
    markers = MarkerCache(storage, manifest, {d.name: digests[d.teacher] for d in manifest.domains}, states)
    domains: dict[str, Domain] = {}
    for source in manifest.domains:
        state = states.get(source.name)
        complete = state is not None and state.complete
        if not complete and not allow_incomplete:
            raise IncompleteCacheError(
                f"{url}: domain {source.name!r} is not finished; run build again, "
                "or set allow_incomplete: true to use what is there"
            )
        if state is None:
            continue
        book = books[source.teacher]
        if book is not None and book.common.size != manifest.vocab_size:
            raise CacheError(f"{url}: the codebook is not one of {manifest.vocab_size} tokens")
        if complete and book is None and manifest.target.kind != "label":
            raise CacheError(f"{url}/{layout.codebook_groups(source.teacher)[0]}: is missing")
        splits: dict[layout.Split, SplitReader] = {}
        for name in layout.SPLITS:
            total = state.split(name).rows
            finished = None
            if not complete:
                finished = _finished(storage, markers, manifest, source.name, name, total)
            elif total and manifest.version > 1:  # a state that claims too much is found here
                markers.get(source.name, name, [layout.shards(total, manifest.shard_rows) - 1])
            splits[name] = SplitReader(storage, manifest, source.name, name, total, markers, book, finished)
        domains[source.name] = Domain(
            source.name, manifest.teachers[source.teacher], state, splits["train"], splits["validation"]
        )
    return Cache(storage, manifest, domains)


def _finished(
    storage: Storage,
    markers: MarkerCache,
    manifest: layout.Manifest,
    domain: str,
    split: layout.Split,
    total: int,
) -> NDArray[np.int64]:
    """The numbers of the shards of an unfinished split that are whole; the last may have grown since."""
    count = layout.shards(total, manifest.shard_rows)
    done = [number for number in finished_shards(storage, domain, split) if number < count]
    if done and done[-1] == count - 1:
        try:
            marker = markers.get(domain, split, [count - 1])[count - 1]
            is_whole = marker.rows == rows_in(total, count - 1, manifest.shard_rows)
        except CacheError:
            is_whole = False
        if not is_whole:
            done.pop()
    return np.array(done, np.int64)


def document_logprobs(
    rows: Rows,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """What the teacher makes of each document, or piece of one: exp(-sum / labels) is its perplexity.

    Returns
    -------
    Four arrays [documents]: the row's place in ``rows``, the segment, how many labels it has, and the sum of
    their log-probabilities in nats. Documents without a label are left out.
    """
    assert rows.label_logprob is not None
    row, position = (found.astype(np.int64) for found in np.nonzero(rows.loss_mask))
    segment = rows.segments[row, position].astype(np.int64)
    found, document = np.unique(row << 16 | segment, return_inverse=True)
    labels = np.bincount(document, minlength=len(found)).astype(np.int64)
    sums = np.bincount(document, rows.label_logprob[row, position], len(found)).astype(np.float64)
    return found >> 16, found & 0xFFFF, labels, sums
