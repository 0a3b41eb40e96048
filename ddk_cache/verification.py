"""Whether every byte of a cache is what was written."""

import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

import numpy as np

from ddk_cache import layout, metadata, shards
from ddk_cache.errors import CacheError
from ddk_cache.lock import locked
from ddk_cache.records import existing_manifest, read_markers, read_state, split_arrays
from ddk_cache.storage import Storage
from ddk_cache.tables import check_documents, read_codebook, read_vocabulary
from ddk_cache.writer import domain_documents

READERS = 4  # shards read at once


@dataclass(frozen=True)
class Problem:
    """Something that is not as it was written."""

    place: str
    """Domain, split and shard, or the document's key."""
    reason: str

    def __str__(self) -> str:
        return f"{self.place}: {self.reason}"


def verify(url: str, advance: Callable[[int], object] = lambda _: None) -> Iterator[Problem]:
    """Read every byte and yield what is damaged or missing.

    A damaged shard loses its marker and its domain is no longer complete (where the store can be written), so
    that training refuses it and the next build does it again. ``advance`` is told the number of bytes read.
    """
    storage = Storage(url)
    manifest = existing_manifest(storage)
    yield from _verify_tables(storage, manifest)
    for source in manifest.domains:
        try:
            state = read_state(storage, source.name)
        except CacheError as error:
            yield Problem(source.name, str(error))
            continue
        if state is None:
            yield Problem(source.name, "is not tokenised yet")
            continue
        yield from _verify_documents(storage, manifest, source.name, state)
        for split in layout.SPLITS:
            checks = _verify_split(storage, manifest, source.name, split, state, advance)
            counted = _Counts()
            for counts, problems in checks:
                counted += counts
                yield from problems
            expected = state.split(split)
            whole = counted.rows == expected.rows
            if whole and (counted.tokens, counted.labels) != (expected.tokens, expected.labels):
                yield Problem(f"{source.name}/{split}", "the counts in the attributes are wrong")
            if whole and split == "validation" and state.teacher_cross_entropy is not None:
                loss = counted.loss / max(counted.labels, 1)
                if not math.isclose(loss, state.teacher_cross_entropy, rel_tol=1e-9):
                    yield Problem(source.name, "the teacher's cross-entropy in the attributes is wrong")


def _verify_tables(storage: Storage, manifest: layout.Manifest) -> Iterator[Problem]:
    for group in (layout.CODEBOOK, layout.VOCABULARY):
        try:
            if group == layout.VOCABULARY:
                read_vocabulary(storage, manifest.tokenizer_hash)
            elif read_codebook(storage) is None:
                yield Problem(group, "is missing")
            for key in check_documents(storage, group):
                yield Problem(key, "is not what the manifest says")
        except CacheError as error:
            yield Problem(group, str(error))


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


def _verify_documents(
    storage: Storage, manifest: layout.Manifest, domain: str, state: layout.DomainState
) -> Iterator[Problem]:
    for key, expected in domain_documents(manifest, domain, state).items():
        raw = storage.read(key)
        if raw is None:
            yield Problem(key, "is missing")
        elif raw != expected:
            yield Problem(key, "is not what the manifest says")


def _verify_split(
    storage: Storage,
    manifest: layout.Manifest,
    domain: str,
    split: layout.Split,
    state: layout.DomainState,
    advance: Callable[[int], object],
) -> Iterator[tuple[_Counts, list[Problem]]]:
    markers = read_markers(storage, manifest, domain, split)
    arrays = split_arrays(manifest, split)
    total = layout.shards(state.split(split).rows, manifest.shard_rows)

    def check(shard: int) -> tuple[_Counts, list[Problem]]:
        place = f"{domain}/{split} shard {shard}"
        if shard not in markers:
            return _Counts(), [Problem(place, "is missing or its marker is damaged")]
        objects: dict[str, bytes] = {}
        problems = []
        for (name, _), (checksum, size) in zip(arrays.items(), markers[shard].tolist(), strict=True):
            data = storage.read(layout.shard_key(domain, split, name, shard))
            advance(len(data or b""))
            if data is None:
                problems.append(Problem(place, f"{name} is missing"))
            elif len(data) != size:
                problems.append(Problem(place, f"{name} has {len(data)} bytes, not {size}"))
            elif shards.checksum(data) != checksum:
                problems.append(Problem(place, f"{name} is damaged"))
            else:
                objects[name] = data
        if problems:
            return _Counts(), problems
        rows = min(manifest.shard_rows, state.split(split).rows - shard * manifest.shard_rows)
        segments, mask, loss = (
            shards.unpack(objects[name], arrays[name], rows, manifest.shard_rows)
            for name in ("segments", "loss_mask", "label_logprob")
        )
        return _Counts(
            rows, int((segments > 0).sum()), int(mask.sum()), -float(loss.sum(dtype=np.float64))
        ), []

    with ThreadPoolExecutor(READERS) as pool:
        for shard, (counts, problems) in enumerate(pool.map(check, range(total))):
            if problems and (state.complete or shard in markers):  # else a build may be about to write it
                _take_back(storage.url, domain, split, shard)
            yield counts, problems


def _take_back(url: str, domain: str, split: layout.Split, shard: int) -> None:
    """Say of a shard, and with it of its domain, that it is not finished."""
    # A store that cannot be written stays as it is, and so does what a build is writing.
    with suppress(CacheError), locked(url, wait=False) as held:
        held.delete(layout.marker_key(domain, split, shard))
        state = read_state(held, domain)  # a build may have changed it meanwhile
        if state is not None and state.complete:
            unfinished = state.model_copy(update={"complete": False})
            held.write(f"{domain}/zarr.json", metadata.group(unfinished.model_dump(mode="json")))
