"""Whether every byte of a cache is what was written, and whether what was written fits together."""

import math
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np

from ddk_cache import codec, layout, shards
from ddk_cache.checks import check_entries, check_labels, check_tokens
from ddk_cache.children import begin
from ddk_cache.errors import CacheError, UnreachableError
from ddk_cache.lock import locked
from ddk_cache.markers import Marker, describe
from ddk_cache.old_markers import old_problem
from ddk_cache.records import (
    domain_documents,
    existing_manifest,
    manifest_document,
    read_markers,
    read_state,
    rows_in,
    shard_limits,
    split_arrays,
)
from ddk_cache.storage import Storage
from ddk_cache.tables import check_group, codebook_digest, read_codebook, read_vocabulary
from ddk_cache.token_seals import OF_ANOTHER_BUILD, TokenSeals, read_seals

READERS = 8  # shards in a process's memory at once: most of them wait for the store, or for a turn
AT_ONCE = 16  # shards that a process is given
ENTRIES_AT_ONCE = 1 << 20  # decoded by each, about 30 bytes an entry; of a row that has more, one by one


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written."""

    place: str
    """Domain, split and shard, or the document's key."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


@dataclass(frozen=True)
class _Counts:
    rows: int = 0
    tokens: int = 0
    labels: int = 0
    loss: float = 0.0

    def __add__(self, other: "_Counts") -> "_Counts":
        return _Counts(
            self.rows + other.rows,
            self.tokens + other.tokens,
            self.labels + other.labels,
            self.loss + other.loss,
        )


@dataclass(frozen=True)
class _Checked:
    """A shard."""

    bytes: int
    """That were read."""
    counts: _Counts
    reason: str | None = None
    """What is wrong with it."""
    has_bad_tokens: bool = False
    """Its tokens may be what is wrong."""


def verify(
    url: str, advance: Callable[[int], object] = lambda _: None, processes: int = 1
) -> Iterator[Problem]:
    """Read every byte and yield what is damaged, missing, another place's, or does not fit together.

    A shard found bad is no longer vouched for and its domain no longer complete (where the store can be
    written and no build is at work), so that training refuses it and the next build does it again. So is a
    domain whose counts were wrong, which are put right.
    ``advance`` is told the number of bytes read. ``processes`` share the shards of a domain that has more
    than AT_ONCE for each; they are started anew, so a script that asks for several must be importable.
    """
    storage = Storage(url)
    manifest = existing_manifest(storage)
    if manifest.version > 1 and storage.read("zarr.json") != manifest_document(manifest):
        yield Problem("zarr.json", "is not what it should be; build writes it anew")
    yield from _verify_tables(storage, manifest)
    for source in manifest.domains:
        try:
            state = read_state(storage, manifest, source.name)
        except CacheError as error:
            yield Problem(f"{source.name}/zarr.json", f"{error}; build tokenises the domain again")
            continue
        if state is None:
            yield Problem(source.name, "is not tokenised yet")
            continue
        yield from _Domain(storage, manifest, source, state).problems(advance, processes)


def _verify_tables(storage: Storage, manifest: layout.Manifest) -> Iterator[Problem]:
    sealed = manifest.version > 1
    groups = [layout.VOCABULARY]
    if manifest.target.kind != "label":
        copies = [
            layout.codebook_groups(teacher) for teacher in sorted({d.teacher for d in manifest.domains})
        ]
        groups += [group for pair in copies for group in pair[: 1 + sealed]]
        for pair in copies if sealed else []:
            if len({storage.read(f"{group}/zarr.json") for group in pair}) > 1:
                yield Problem(pair[0], f"is not the same as {pair[1]}")
    for group in groups:
        for reason in check_group(storage, group, sealed=sealed):
            yield Problem(group, reason)
    with suppress(CacheError):
        read_vocabulary(storage, manifest.tokenizer_hash)
        return
    yield Problem(layout.VOCABULARY, "is not the tokenizer that the manifest tells of")


class _Domain:
    """One domain's checks."""

    def __init__(
        self,
        storage: Storage,
        manifest: layout.Manifest,
        source: layout.DomainSource,
        state: layout.DomainState,
    ) -> None:
        self.storage, self.manifest, self.name, self.state = storage, manifest, source.name, state
        self.codebook: codec.Codebook | None = None
        with suppress(CacheError):  # told already
            self.codebook = read_codebook(storage, source.teacher)
        self.seals: dict[layout.SplitName, TokenSeals] = {}
        self.counted: dict[str, layout.SplitState] = {}  # of splits whose counts are wrong

    def problems(self, advance: Callable[[int], object], processes: int) -> Iterator[Problem]:
        if self.manifest.version > 1:
            yield from self._documents()
        bad: list[tuple[layout.SplitName, int, bool]] = []  # split, shard, whether its tokens are
        for split in layout.SPLITS:
            counted = _Counts()
            total = layout.shards(self.state.split(split).rows, self.manifest.shard_rows)
            there = min(total, self._end(split))
            try:
                self.seals[split] = read_seals(
                    self.storage, self.manifest, self.name, split, self.state.split(split)
                )
            except UnreachableError:
                raise
            except CacheError:
                yield Problem(
                    f"{self.name}/{split}",
                    "the list of its shards is missing or damaged; build writes it anew",
                )
            for shard, found in enumerate(self._checks(split, there, processes)):
                advance(found.bytes)
                counted += found.counts
                if found.reason:
                    yield Problem(f"{self.name}/{split} shard {shard}", found.reason)
                    bad.append((split, shard, found.has_bad_tokens))
            if there < total:
                last = f" and all others up to {total - 1}" if there < total - 1 else ""
                yield Problem(f"{self.name}/{split} shard {there}{last}", "nothing of it is there")
                bad.append((split, there, True))
            yield from self._counts(split, counted)
        if (bad or self.counted) and self.manifest.version > 1:
            yield from self._take_back(bad)

    def _end(self, split: layout.SplitName) -> int:
        """The number behind the last shard of which there is anything."""
        keys = self.storage.sizes(f"{self.name}/{split}")
        numbers = (key.removesuffix("/0").rpartition("/c/")[2].partition("/")[0] for key in keys)
        return 1 + max((int(number) for number in numbers if number.isdigit()), default=-1)

    def _readers(self) -> int:
        """How many shards are looked at side by side: fewer where one row takes much memory."""
        return max(1, min(READERS, READERS * ENTRIES_AT_ONCE // self._row_entries))

    @property
    def _row_entries(self) -> int:
        return self.manifest.seq_length * max(1, self.manifest.target.width)

    def _documents(self) -> Iterator[Problem]:
        for key, expected in domain_documents(self.manifest, self.name, self.state).items():
            raw = self.storage.read(key)
            if raw is None:
                yield Problem(key, "is missing; build writes it anew")
            elif raw != expected:
                yield Problem(key, "is not what it should be; build writes it anew")

    def _counts(self, split: layout.SplitName, counted: _Counts) -> Iterator[Problem]:
        expected = self.state.split(split)
        if counted.rows != expected.rows:
            return
        if (counted.tokens, counted.labels) != (expected.tokens, expected.labels):
            yield Problem(f"{self.name}/{split}", "the counts in the attributes are wrong")
            right = {"tokens": counted.tokens, "labels": counted.labels}
            self.counted[split] = expected.model_copy(update=right)
        if split == "validation" and self.state.teacher_cross_entropy is not None:
            loss = counted.loss / max(counted.labels, 1)
            if not math.isclose(loss, self.state.teacher_cross_entropy, rel_tol=1e-9):
                yield Problem(self.name, "the teacher's cross-entropy in the attributes is wrong")

    def _checks(self, split: layout.SplitName, total: int, processes: int) -> Iterator[_Checked]:
        """What was found in each of the split's shards."""
        parts = [range(first, min(first + AT_ONCE, total)) for first in range(0, total, AT_ONCE)]
        if processes == 1 or len(parts) <= processes:
            for part in parts:
                yield from self._check_some(split, part)
            return
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(processes, mp_context=context, initializer=begin) as pool:
            for found in pool.map(partial(self._check_some, split), parts):
                yield from found

    def _check_some(self, split: layout.SplitName, part: range) -> list[_Checked]:
        with ThreadPoolExecutor(self._readers()) as pool:
            return list(pool.map(partial(self._check, split), part))

    def _check(self, split: layout.SplitName, shard: int) -> _Checked:
        objects: dict[str, bytes] = {}
        tokens = layout.token_arrays(self.manifest.seq_length)
        names = list(split_arrays(self.manifest, split))
        found = self.storage.read_all(shard_limits(self.manifest, self.name, split, shard, names))
        size = sum(len(data or b"") for data in found)
        for name, data in zip(names, found, strict=True):
            if data is None:
                reason = f"{name} is missing, or larger than it can be"
                return _Checked(size, _Counts(), reason, name in tokens)
            objects[name] = data
        try:
            if (problem_at := next(self._vouching(split, shard, objects), None)) is not None:
                name, problem = problem_at
                return _Checked(size, _Counts(), problem, name in (layout.TOKEN_MARKERS, *tokens))
            return _Checked(size, self._rows(split, shard, objects))
        except ValueError as error:
            return _Checked(size, _Counts(), str(error), True)

    def _vouching(
        self, split: layout.SplitName, shard: int, objects: dict[str, bytes]
    ) -> Iterator[tuple[str, str]]:
        """What the markers say against a shard's objects: which array, or kind of marker, and the reason."""
        manifest, rows = self.manifest, rows_in(self.state.split(split).rows, shard, self.manifest.shard_rows)
        if manifest.version == 1:
            problem = old_problem(self.storage, manifest, self.name, split, shard, list(objects.values()))
            if problem:
                yield "", problem
            return
        book = codebook_digest(self.codebook) if self.codebook else None
        meant: dict[str, Marker] = {}
        for kind in (layout.TOKEN_MARKERS, layout.MARKERS):
            (marker,) = read_markers(self.storage, manifest, self.name, split, [shard], book, kind)
            if isinstance(marker, UnreachableError):  # that says nothing of what is there
                raise marker
            if isinstance(marker, CacheError):
                yield kind, str(marker).removeprefix(f"{self.storage.url}/")
                return
            if marker.rows != rows:
                yield kind, f"is a shard of {marker.rows} rows, not {rows}"
            if split in self.seals and not self.seals[split].knows(shard, marker):
                yield kind, OF_ANOTHER_BUILD
            meant[kind] = marker
        tokens, marker = meant[layout.TOKEN_MARKERS], meant[layout.MARKERS]
        if not np.array_equal(tokens.records, marker.records[: len(tokens.records)]):
            yield layout.MARKERS, "its markers do not agree on its tokens"
        for at, (name, data) in enumerate(objects.items()):
            if len(data) != marker.records[at]["size"]:
                yield name, f"{name} has {len(data)} bytes, not {marker.records[at]['size']}"
            elif not marker.vouches_for(at, data):
                yield name, f"{name} is damaged or another shard's"
        if not np.array_equal(
            describe(list(objects.values()), rows, manifest.shard_rows).records, marker.records
        ):
            yield layout.MARKERS, "the marker contradicts its own shard"

    def _rows(self, split: layout.SplitName, shard: int, objects: dict[str, bytes]) -> _Counts:
        """Decode everything and check the rows against each other; raises ValueError."""
        manifest, arrays = self.manifest, split_arrays(self.manifest, split)
        rows = rows_in(self.state.split(split).rows, shard, manifest.shard_rows)
        counted, step = _Counts(), max(1, ENTRIES_AT_ONCE // self._row_entries)
        for first in range(0, rows, step):
            count = min(step, rows - first)
            found = {
                name: shards.unpack(objects[name], arrays[name], count, manifest.shard_rows, first)
                for name in arrays
            }
            mask, labels = found["loss_mask"], found["label_logprob"]
            check_tokens(found["tokens"], found["segments"], mask, manifest.vocab_size)
            check_labels(labels, mask)
            if manifest.has_targets(split) and self.codebook is not None:
                check_entries(found["entries"], mask)
                codec.decode(found, self.codebook, manifest.target)
            loss = -float(labels.sum(dtype=np.float64))
            counted += _Counts(count, int((found["segments"] > 0).sum()), int(mask.sum()), loss)
        return counted

    def _take_back(self, bad: list[tuple[layout.SplitName, int, bool]]) -> Iterator[Problem]:
        """Vouch for these shards no more, put counts right, and say of the domain that it is not finished."""
        # A store that cannot be written stays as it is, and so does what a build is writing.
        with suppress(CacheError), locked(self.storage.url, wait=False) as held:
            if read_state(held, self.manifest, self.name) != self.state:
                yield Problem(self.name, "a build has gone on meanwhile: verify again")
                return
            for split, shard, has_bad_tokens in bad:
                held.delete(layout.marker_key(self.name, split, shard))
                if has_bad_tokens:
                    held.delete(layout.marker_key(self.name, split, shard, layout.TOKEN_MARKERS))
            if self.state.complete or self.counted:
                unfinished = self.state.model_copy(update={"complete": False, **self.counted})
                documents = domain_documents(self.manifest, self.name, unfinished)
                held.write(f"{self.name}/zarr.json", documents[f"{self.name}/zarr.json"])
