"""Write a cache: tokens first, then one shard of the teacher's answers at a time, committed by its marker.

Every step can be killed. What a marker vouches for is whole; everything else is done again, to the same
bytes.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddk_cache import codec, layout, metadata, shards
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.lock import Holder, LockedStorage, locked
from ddk_cache.records import read_manifest, read_markers, read_state, split_arrays
from ddk_cache.tables import read_codebook, write_codebook, write_vocabulary
from ddk_cache.tokens import Vocabulary

Arrays = dict[str, NDArray[Any]]


class Writer:
    """A build's hold on a cache; made by ``open_writer``."""

    def __init__(self, storage: LockedStorage, manifest: layout.Manifest) -> None:
        self.manifest = manifest
        self._storage = storage

    @property
    def holder(self) -> Holder:
        """The lock's, in the process that took it: it admits others to write, and dismisses them."""
        assert isinstance(self._storage, Holder)
        return self._storage

    def state(self, domain: str) -> layout.DomainState | None:
        """How far the domain is; None until its tokens are written."""
        return read_state(self._storage, domain)

    def set_state(self, domain: str, state: layout.DomainState) -> None:
        """Lay out the domain's arrays for the rows of ``state``, then record it."""
        for key, document in domain_documents(self.manifest, domain, state).items():
            if self._storage.read(key) != document:
                self._storage.write(key, document)

    def read_ledger(self, domain: str, limits: int) -> bytes | None:
        """The build's account of the domain's documents, as it was kept after ``limits`` readings."""
        return self._storage.read(layout.ledger_key(domain, limits))

    def write_ledger(self, domain: str, limits: int, data: bytes) -> None:
        """Keep the build's account of the domain's documents; the state that tells of it comes after."""
        self._storage.write(layout.ledger_key(domain, limits), data)

    def write_tokens(
        self, domain: str, split: layout.Split, shard: int, rows: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a shard's token arrays, [n, S] each by name; only the last shard may have fewer rows.

        Objects that are there already stay untouched, and so does the marker over them.

        Raises
        ------
        CacheError
            Tokens written in an earlier run are others: the domain's source has changed since.
        """
        known = self.state(domain) is not None
        for name, array in layout.token_arrays(self.manifest.seq_length).items():
            key = layout.shard_key(domain, split, name, shard)
            data = shards.pack(rows[name], array, self.manifest.shard_rows)
            before = self._storage.read(key)
            if before == data:
                continue
            if known and before is not None:
                # Rows beyond those that the state tells of are what a killed build has left.
                vouched = max(0, self.rows(domain, split, shard))
                old = self._healthy_rows(before, array)[:vouched]
                if not np.array_equal(old, rows[name][: len(old)]):
                    raise CacheError(
                        f"{self._storage.url}: the source of domain {domain!r} has changed since the cache "
                        "was built: build into a new cache"
                    )
            self._storage.delete(layout.marker_key(domain, split, shard))
            self._storage.write(key, data)

    def read_tokens(self, domain: str, split: layout.Split, shard: int) -> Arrays | None:
        """A shard's token arrays, [n, S] each by name; None where they are missing or damaged."""
        arrays = layout.token_arrays(self.manifest.seq_length)
        found = self._healthy(domain, split, shard, arrays)
        return found if len(found["tokens"]) == self.rows(domain, split, shard) else None

    def read_answers(self, domain: str, split: layout.Split, shard: int) -> Arrays:
        """What an unfinished shard has of the teacher's answers already: its first rows, maybe none.

        Nothing is asked of the teacher twice: a shard that grew keeps what was said of its first rows.
        """
        return self._healthy(domain, split, shard, self._answer_arrays(split))

    def write_answers(
        self, domain: str, split: layout.Split, shard: int, answers: Mapping[str, NDArray[Any]]
    ) -> None:
        """Write a shard's answers, [n, width] each by name, then the marker that vouches for the shard."""
        for name, array in self._answer_arrays(split).items():
            data = shards.pack(answers[name], array, self.manifest.shard_rows)
            self._storage.write(layout.shard_key(domain, split, name, shard), data)
        objects = [
            self._storage.read(layout.shard_key(domain, split, name, shard)) or b""
            for name in split_arrays(self.manifest, split)
        ]
        marker = np.array([(shards.checksum(data), len(data)) for data in objects], "<u4")
        self._storage.write(layout.marker_key(domain, split, shard), shards.seal(marker.tobytes()))

    def unfinished(self, domain: str, split: layout.Split) -> list[int]:
        """Numbers of the shards without a marker, or with an object missing or of the wrong size."""
        sizes = self._storage.sizes(f"{domain}/{split}")
        markers = read_markers(self._storage, self.manifest, domain, split)
        arrays = split_arrays(self.manifest, split)

        def is_finished(shard: int) -> bool:
            objects = [sizes.get(layout.shard_key(domain, split, name, shard)) for name in arrays]
            return shard in markers and objects == markers[shard][:, 1].tolist()

        total = layout.shards(self.split_state(domain, split).rows, self.manifest.shard_rows)
        return [shard for shard in range(total) if not is_finished(shard)]

    def settle(self, domain: str) -> layout.DomainState:
        """Record what is finished: the teacher's cross-entropy once the validation split is, then all of it.

        The cross-entropy is the mean over the validation split's labels, in nats and float64.
        """
        state = self.state(domain)
        assert state is not None
        loss = None
        if not self.unfinished(domain, "validation"):
            total, arrays = 0.0, layout.label_array(self.manifest.seq_length)
            for shard in range(layout.shards(state.validation.rows, self.manifest.shard_rows)):
                labels = self._healthy(domain, "validation", shard, arrays)
                total -= float(labels["label_logprob"].sum(dtype=np.float64))
            loss = total / state.validation.labels
        complete = loss is not None and not self.unfinished(domain, "train")
        settled = state.model_copy(update={"complete": complete, "teacher_cross_entropy": loss})
        self.set_state(domain, settled)
        return settled

    def codebook(self) -> codec.Codebook | None:
        """The tables that the codec needs; None where they are missing or damaged."""
        with suppress(CacheError):
            return read_codebook(self._storage)
        return None

    def set_codebook(self, codebook: codec.Codebook) -> None:
        """Keep the codec's tables; raises CacheError where others are there already."""
        write_codebook(self._storage, codebook)

    def split_state(self, domain: str, split: layout.Split) -> layout.SplitState:
        """A tokenised domain's counts."""
        state = self.state(domain)
        assert state is not None
        return state.split(split)

    def rows(self, domain: str, split: layout.Split, shard: int) -> int:
        """Rows of a shard."""
        return min(
            self.manifest.shard_rows, self.split_state(domain, split).rows - shard * self.manifest.shard_rows
        )

    def tokens(self, domain: str, split: layout.Split, numbers: Sequence[int]) -> int:
        """About how many tokens the numbered shards have, padding left out: the split's mean a row."""
        counts = self.split_state(domain, split)
        rows = sum(self.rows(domain, split, shard) for shard in numbers)
        return round(counts.tokens * rows / max(counts.rows, 1))

    def tokens_are_whole(self, domain: str) -> bool:
        """Whether the tokens of every unfinished shard can be read; finished ones are not looked at."""
        return all(
            self.read_tokens(domain, split, shard) is not None
            for split in layout.SPLITS
            for shard in self.unfinished(domain, split)
        )

    def _answer_arrays(self, split: layout.Split) -> dict[str, layout.RowArray]:
        tokens = layout.token_arrays(self.manifest.seq_length)
        return {
            name: array for name, array in split_arrays(self.manifest, split).items() if name not in tokens
        }

    def _healthy(
        self, domain: str, split: layout.Split, shard: int, arrays: Mapping[str, layout.RowArray]
    ) -> Arrays:
        """The first rows of a shard that are whole in each of the arrays."""
        found: Arrays = {}
        for name, array in arrays.items():
            data = self._storage.read(layout.shard_key(domain, split, name, shard))
            found[name] = self._healthy_rows(data or b"", array)
        count = min(self.rows(domain, split, shard), *map(len, found.values()))
        return {name: rows[:count] for name, rows in found.items()}

    def _healthy_rows(self, data: bytes, array: layout.RowArray) -> NDArray[Any]:
        return shards.unpack_healthy(data, array, self.manifest.shard_rows)


def domain_documents(manifest: layout.Manifest, domain: str, state: layout.DomainState) -> dict[str, bytes]:
    """Every zarr.json of a domain by key, in the order to write them: the one with its state last."""
    found: dict[str, bytes] = {}
    for split in layout.SPLITS:
        rows, arrays = state.split(split).rows, split_arrays(manifest, split)
        for name, array in arrays.items():
            found[f"{domain}/{split}/{name}/zarr.json"] = metadata.row_array(array, rows, manifest.shard_rows)
        markers = metadata.marker_array(layout.shards(rows, manifest.shard_rows), list(arrays))
        found[f"{domain}/{split}/markers/zarr.json"] = markers
        found[f"{domain}/{split}/zarr.json"] = metadata.group()
    found[f"{domain}/zarr.json"] = metadata.group(state.model_dump(mode="json"))
    return found


@contextmanager
def open_writer(url: str, manifest: layout.Manifest, vocabulary: Vocabulary) -> Iterator[Writer]:
    """Create the cache, or go on with the one that is there, while holding its lock.

    Domains may have been added and max_tokens raised since; the manifest on disk then follows.

    Raises
    ------
    ConfigError
        The cache there was built with another configuration; the message lists what differs.
    CacheError
        Another build is at work, or the place cannot be written.
    """
    with locked(url) as storage:
        there = read_manifest(storage)
        if there is not None and there.version < manifest.version:
            raise ConfigError(
                f"{url}: has format version {there.version}, which is read but not extended: "
                "build into a new cache"
            )
        if there is not None:
            # A domain without its tokens binds nobody: what kept its source from being read can be mended.
            bound = tuple(domain for domain in there.domains if read_state(storage, domain.name))
            differences = manifest_differences(there.model_copy(update={"domains": bound}), manifest)
            if bound and differences:
                raise ConfigError(f"{url}: was built with another configuration: {'; '.join(differences)}")
        write_vocabulary(storage, vocabulary)
        if there != manifest:
            storage.write("zarr.json", metadata.group(manifest.model_dump(mode="json")))
        yield Writer(storage, manifest)


def manifest_differences(there: layout.Manifest, wanted: layout.Manifest) -> list[str]:
    """What keeps a cache from being extended to ``wanted``, as "key: in the cache -> wanted"."""
    exempt = {"domains", "teachers", "version"}
    before = there.model_dump(exclude=exempt) | _teacher_keys("teacher", there.teachers[0])
    after = wanted.model_dump(exclude=exempt) | _teacher_keys("teacher", wanted.teachers[0])
    for domain in there.domains:
        match = next((other for other in wanted.domains if other.name == domain.name), None)
        key = f"domains.{domain.name}"
        before[key], after[key] = domain.source, match and match.source
        if match is None:
            continue
        if domain.teacher or match.teacher:
            before |= _teacher_keys(f"{key}.teacher", there.teacher_of(domain.name))
            after |= _teacher_keys(f"{key}.teacher", wanted.teacher_of(domain.name))
        if _limit(match.max_tokens) < _limit(domain.max_tokens):
            before[f"{key}.max_tokens"], after[f"{key}.max_tokens"] = domain.max_tokens, match.max_tokens
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _teacher_keys(prefix: str, teacher: layout.TeacherInfo) -> dict[str, Any]:
    """What of a teacher decides the numbers, key by key."""
    found = {
        f"{prefix}.{key}": value for key, value in teacher if key not in ("engine_version", "engine_args")
    }
    return found | {f"{prefix}.engine_args.{key}": value for key, value in teacher.engine_args.items()}


def _limit(max_tokens: int | None) -> float:
    return float("inf") if max_tokens is None else max_tokens
