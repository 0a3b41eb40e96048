"""A large cache made in minutes: the one train shard of a small cache, repeated under new commit records."""

import os
from collections.abc import Callable
from pathlib import Path

from ddk_cache.cache.codebooks import codebook_digest, read_codebook
from ddk_cache.cache.commits import CommitReader
from ddk_cache.cache.metadata import domain_documents, existing_manifest, read_state, split_arrays
from ddk_cache.format import layout
from ddk_cache.storage.lock import locked

Put = Callable[[str, "bytes | Path"], object]


def put_into(folder: Path) -> Put:
    """Return a function that stores an object in ``folder``; a file is hard-linked, not copied."""

    def put(key: str, source: bytes | Path) -> None:
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        if isinstance(source, Path):
            os.link(source, path)
        else:
            path.write_bytes(source)

    return put


def repeat_shard(small: Path, put: Put, shards: int, answered: int | None = None) -> None:
    """Store a cache of ``shards`` train shards in its domain ``text``.

    Parameters
    ----------
    small
        A cache with one full train shard.
    answered
        Shards with answers, the first ones; the others have tokens alone. Default: all.
    """
    answered = shards if answered is None else answered
    with locked(str(small)) as storage:
        manifest = existing_manifest(storage)
        state, codebook = read_state(storage, manifest, "text"), read_codebook(storage, 0)
        assert state is not None
        assert codebook is not None
        digest = codebook_digest(codebook)
        commits = CommitReader(storage, manifest, lambda _: digest)
        first_shard = [layout.ShardKey("text", "train", 0)]
        records = {kind: next(commits.read(first_shard, kind)) for kind in layout.KINDS}
    for file in sorted(small.rglob("*")):
        if file.is_file():
            put(file.relative_to(small).as_posix(), file)
    token_arrays = layout.token_arrays(manifest.seq_length)
    for name in split_arrays(manifest, "text", "train"):
        first = small / layout.ShardKey("text", "train", 0).object(name)
        for shard in range(1, shards if name in token_arrays else answered):
            put(layout.ShardKey("text", "train", shard).object(name), first)
    for kind, record in records.items():
        assert not isinstance(record, Exception)
        for shard in range(1, shards if kind == layout.TOKEN_COMMITS else answered):
            at = layout.ShardKey("text", "train", shard)
            put(at.object(kind), record.serialise(commits.identity(at, kind)))
    counts = {name: getattr(state.train, name) * shards for name in ("rows", "tokens", "labels")}
    train = layout.SplitState(**counts)
    for key, data in domain_documents(manifest, "text", state.model_copy(update={"train": train})).items():
        put(key, data)
