"""Hostile caches: every change comes with valid digests."""

import os
import zlib
from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from pcodec import ChunkConfig, standalone

from ddk_cache.cache.codebooks import codebook_digest, read_codebook
from ddk_cache.cache.metadata import existing_manifest, split_arrays
from ddk_cache.format import commit_record, layout, shards
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.storage import Storage
from helpers.caches import SEQ_LENGTH, VOCABULARY, edit

Change = Callable[[Path], object]
Case = tuple[Change, str | None]  # the change; a pattern for the message, None if no row is affected
CASES: dict[str, Case] = {}

TRAIN = "code/train"
SHARD = layout.ShardKey("code", "train", 0)


def commit(
    cache: Path, objects: Mapping[str, bytes], change: Callable[[Any], object] = lambda _: None
) -> None:
    """Put objects of code/train shard 0, under commit records that cover them.

    ``change`` is made to the records' arrays before the shard digest is computed.
    """
    storage = Storage(str(cache))
    manifest = existing_manifest(storage)
    codebook = read_codebook(storage)
    assert codebook is not None
    names = list(split_arrays(manifest, SHARD.domain, "train"))
    for name, data in objects.items():
        (cache / SHARD.object(name)).write_bytes(data)
    stored = [(cache / SHARD.object(name)).read_bytes() for name in names]
    for kind, count, digest in (
        (layout.COMMITS, len(names), codebook_digest(codebook)),
        (layout.TOKEN_COMMITS, 3, None),
    ):
        record = commit_record.describe(stored[:count], manifest.shard_rows, manifest.shard_rows)
        change(record.arrays)
        identity = commit_record.shard_identity(manifest, SHARD, digest)
        (cache / SHARD.object(kind)).write_bytes(record.serialise(identity))


def rows(name: str, change: Callable[[np.ndarray], object]) -> Change:
    """Change the values of one array [R, width]."""

    def forge(cache: Path) -> None:
        manifest = existing_manifest(Storage(str(cache)))
        array = split_arrays(manifest, SHARD.domain, "train")[name]
        data = (cache / SHARD.object(name)).read_bytes()
        values = shards.decode(data, array, manifest.shard_rows).copy()
        change(values)
        commit(cache, {name: shards.encode(values, array, manifest.shard_rows)})

    return forge


def at(*index: int | slice, value: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(index, value)


def chunk(name: str, body: bytes) -> Change:
    """Replace the compressed chunk of an array's first row."""

    def forge(cache: Path) -> None:
        data = (cache / SHARD.object(name)).read_bytes()
        R = existing_manifest(Storage(str(cache))).shard_rows
        ends = np.cumsum(shards.chunk_lengths(data, R)).tolist()
        rest = [data[start:end] for start, end in pairwise(ends)]
        commit(cache, {name: shards.join([shards.add_checksum(body), *rest], R)})

    return forge


def index(change: Callable[[np.ndarray], object]) -> Change:
    """Change the index, uint64 [R, 2], of an array's shard."""

    def forge(cache: Path) -> None:
        path = cache / SHARD.object("codes")
        data, R = path.read_bytes(), existing_manifest(Storage(str(cache))).shard_rows
        spans = np.frombuffer(data[-shards.index_size(R) : -4], "<u8").reshape(R, 2).copy()
        change(spans)
        path.write_bytes(data[: -shards.index_size(R)] + shards.add_checksum(spans.tobytes()))

    return forge


def documents(name: str, raw: bytes, message: str = "damaged") -> None:
    """Write the same bytes as each of the documents that are read first."""
    for key in ("zarr.json", "code/zarr.json"):
        CASES[f"{key}: {name}"] = (lambda cache, key=key: (cache / key).write_bytes(raw), message)  # type: ignore[misc]


def attribute(text: str) -> bytes:
    return b'{"zarr_format": 3, "node_type": "group", "attributes": {"ddk_cache": ' + text.encode() + b"}}"


# Documents that are not valid.
documents("empty", b"")
documents("no JSON", b"{")
documents("no UTF-8", b"\xff\xfe{")
documents("a list", b"[]")
documents("a number", b"7")
documents("no attributes", b'{"zarr_format": 3, "node_type": "group"}')
documents("an array", attribute("{}").replace(b"group", b"array"), "is not a zarr v3 group")
documents("an attribute that is a list", attribute("[]"), "must be an object")
documents("lists 100,000 deep", attribute("[" * 100_000 + "]" * 100_000))
documents("objects 100,000 deep", attribute('{"a":' * 100_000 + "1" + "}" * 100_000))
documents("a number of 5,000 digits", attribute('{"sha256": ' + "9" * 5000 + "}"))
documents("not a number", attribute('{"sha256": "x", "seed": NaN}'))
documents("infinite", attribute('{"sha256": "x", "seed": 1e999}'))


def manifest(name: str, message: str, **changes: object) -> None:
    CASES[f"manifest: {name}"] = (
        lambda cache: edit(cache / "zarr.json", lambda m: m.update(changes)),
        message,
    )


def domain_named(name: str) -> None:
    CASES[f"a domain named {name[:20]!r}"] = (
        lambda cache: edit(cache / "zarr.json", lambda m: m["domains"][0].update(name=name)),
        "domains.0.name",
    )


manifest("another format", "is not a ddk-cache cache", format="tar")
manifest("an older version", "version 2.*build the cache again", version=2)
manifest("a newer version", "version 4.*upgrade", version=4)
manifest("a version as text", "format version 'two'", version="two")
manifest("no rows a shard", "shard_rows", shard_rows=0)
manifest("shards of 2^40 rows", "shard_rows", shard_rows=1 << 40)
manifest("shards of 2^40 tokens", "at most 268,435,456 tokens", shard_rows=1 << 20, seq_length=1 << 20)
manifest("rows of one token", "seq_length", seq_length=1)
manifest("rows of 2^40 tokens", "seq_length", seq_length=1 << 40)
manifest(
    "rows of 2^32 entries", "seq_length x entries", shard_rows=1, seq_length=1 << 20, target={"top_k": 4096}
)
manifest("other rows", "belongs to another domain, cache or build", seq_length=17)
manifest("a vocabulary of 2^40", "belongs to another domain", vocab_size=1 << 40)
manifest("no vocabulary", "vocab_size", vocab_size=0)
manifest("an unknown target", "target.kind", target={"kind": "pickle"})
manifest("a billion entries", "target.top_k", target={"top_k": 10**9})
manifest("no temperature", "target.temperature", target={"temperature": 0})
manifest("an infinite seed", "seed", seed=1.5)
manifest("an invalid fingerprint", "tokenizer_hash", tokenizer_hash="x" * 64)
manifest("a length as text", "seq_length", seq_length="16")
manifest("a teacher without a name", "teachers.0", teachers=[{"model": 3}])
manifest("domains of null", "domains", domains=None)
manifest("no domains", "domains", domains=[])
manifest("no teachers", "teachers", teachers=[])
manifest("an unknown key", "unknown key", run="ls")
manifest(
    "2,000 domains",
    "domains",
    domains=[{"name": f"d{n}", "source": {}, "max_tokens": None, "teacher_index": 0} for n in range(2000)],
)
manifest(
    "two domains of one name",
    "two domains have the same name",
    domains=[{"name": "code", "source": {}, "max_tokens": None, "teacher_index": 0}] * 2,
)
manifest(
    "a missing teacher",
    "a domain's teacher_index is not among the teachers",
    domains=[{"name": "code", "source": {}, "max_tokens": None, "teacher_index": 63}],
)
manifest(
    "an invalid build id",
    "build_id",
    domains=[{"name": "code", "source": {}, "max_tokens": None, "build_id": "x"}],
)
manifest("another overlap", "belongs to another domain, cache or build", overlap=3)
manifest("an overlap below 0", "overlap", overlap=-1)
for tricky in (
    "../x",
    "/etc",
    "",
    "a" * 300,
    "a\nb",
    "a/b",
    ".",
    "..",
    "a\x00b",
    "ddk.codebook",
    "a\\b",
    "\x1b[2J",
):
    domain_named(tricky)


def state(name: str, message: str | None, change: Callable[[dict[str, Any]], object]) -> None:
    CASES[f"state: {name}"] = (lambda cache: edit(cache / "code/zarr.json", change), message)


state("10^9 train rows", "shard", lambda s: s["train"].update(rows=10**6))
state(
    "2^39 train rows",
    "train.rows: make more than 1,048,576 shards",
    lambda s: s["train"].update(rows=1 << 39),
)
state("2^39 validation rows", "more than 1,048,576 shards", lambda s: s["validation"].update(rows=1 << 39))
state("2^41 rows", "train.rows", lambda s: s["train"].update(rows=1 << 41))
state("rows below 0", "train.rows", lambda s: s["train"].update(rows=-1))
state("half a row", "train.rows", lambda s: s["train"].update(rows=0.5))
state("too few rows", "rows, not", lambda s: s["train"].update(rows=9))
state("too many tokens", "counts in the attributes are wrong", lambda s: s["train"].update(tokens=125))
state("more tokens than rows hold", "train.tokens: are more", lambda s: s["train"].update(tokens=161))
state("more labels than tokens", "train.labels: are more", lambda s: s["train"].update(labels=121))
state("nothing to validate on", "validation.labels", lambda s: s["validation"].update(labels=0))
state("too few labels", "counts in the attributes are wrong", lambda s: s["train"].update(labels=1))
state(
    "another cross-entropy", "cross-entropy in the attributes", lambda s: s.update(teacher_cross_entropy=0.5)
)
state("a cross-entropy below 0", "teacher_cross_entropy", lambda s: s.update(teacher_cross_entropy=-1))
state("a cross-entropy of 701", "teacher_cross_entropy", lambda s: s.update(teacher_cross_entropy=701))
state("no limits", "limits", lambda s: s.update(limits=[]))
state("counts as text", "skipped", lambda s: s.update(skipped={"empty": "many"}))
for key in ("fingerprint", "build_id"):
    state(f"no {key}", "belongs to another domain, cache or build", lambda s, key=key: s.pop(key))  # type: ignore[misc]
state("another build id", "belongs to another domain", lambda s: s.update(build_id="0" * 32))
state("an unknown key", "unknown key", lambda s: s.update(run="ls"))
state("control characters in reasons", None, lambda s: s.update(skipped={"\x1b[2J\x1b]0;x\x07\u202e": 3}))

# Tokens, masks and answers that contradict each other, each under a commit record that covers it.
LAST = SEQ_LENGTH - 1
for name, array, change, message in (
    ("a token beyond the vocabulary", "tokens", at(0, 0, value=VOCABULARY), "not in the vocabulary"),
    ("the largest token", "tokens", at(0, 0, value=2**32 - 1), "not in the vocabulary"),
    ("segments that begin with 2", "segments", at(0, 0, value=2), "segments are not in order"),
    ("segments that go back", "segments", at(0, 9, value=1), "segments are not in order"),
    ("segments behind the padding", "segments", at(0, LAST, value=3), "segments are not in order"),
    ("a mask of 2", "loss_mask", at(0, 0, value=2), "loss mask has values"),
    ("a label across documents", "loss_mask", at(0, 7, value=1), "without a label in its document"),
    ("a label in the padding", "loss_mask", at(0, LAST, value=1), "without a label in its document"),
    (
        "a mask without entries",
        "loss_mask",
        at(0, 0, value=0),
        "without a label has a log-probability|at different positions",
    ),
    ("a label of NaN", "label_logprob", at(0, 0, value=np.nan), "not a log-probability"),
    ("a label of infinity", "label_logprob", at(0, 0, value=-np.inf), "not a log-probability"),
    ("a label above 0", "label_logprob", at(0, 0, value=0.5), "not a log-probability"),
    (
        "an answer without a label",
        "label_logprob",
        at(0, LAST, value=-1),
        "without a label has a log-probability",
    ),
    ("too many entries", "entries", at(0, 0, value=6), "entries, more than 5"),
    ("the most entries", "entries", at(0, 0, value=65535), "entries, more than 5"),
    ("entries in the padding", "entries", at(0, LAST, value=1), "at different positions"),
    ("no entries", "entries", at(0, 0, value=0), "at different positions"),
    ("a missing ranking", "rankings", at(0, 0, value=60000), "out of range"),
    ("a code beyond the vocabulary", "codes", at(0, 0, value=2**31), "out of range"),
    ("the largest code", "codes", at(0, 0, value=2**32 - 1), "out of range"),
    ("one id twice", "codes", at(0, slice(0, 50), value=5), "an id twice|out of range"),
    ("gaps out of range", "gaps", at(0, slice(0, 40), value=65535), "a level is out of range"),
    ("a tail out of range", "tail", at(0, 0, value=1), "a level is out of range"),
):
    CASES[f"rows: {name}"] = (rows(array, change), message)

# Chunks that would expand, or are not valid.
BOMB = np.zeros(1 << 26, np.uint8)


def zstd(values: np.ndarray) -> bytes:
    return bytes(Zstd(level=3).encode(values))


def pcodec(values: np.ndarray) -> bytes:
    return bytes(standalone.simple_compress(values, ChunkConfig()))


FRAME = zstd(np.zeros(SEQ_LENGTH, np.uint8))
CLAIM = FRAME[:4] + b"\xe0" + (1 << 40).to_bytes(8, "little")
CHUNKS = (
    ("zstd of 64 MiB", "loss_mask", zstd(BOMB), "expands to 67108864 bytes"),
    ("zstd that claims 1 TiB", "loss_mask", CLAIM, "expands to"),
    ("zstd without a size", "loss_mask", FRAME[:4] + bytes([FRAME[4] & 0x1F]) + FRAME[5:], "expands to None"),
    ("zstd of 3 bytes", "loss_mask", zstd(BOMB[:3]), "expands to 3 bytes"),
    ("zstd of two frames", "loss_mask", FRAME + zstd(BOMB), "destination buffer too small"),
    ("no zstd", "loss_mask", b"zstd" * 9, "is not a zstd frame"),
    ("nothing", "loss_mask", b"", "is not a zstd frame"),
    ("pcodec of 16 MiB", "tokens", pcodec(BOMB.view(np.uint32)[: 1 << 22]), "does not hold 16 numbers"),
    ("pcodec of 3 numbers", "tokens", pcodec(np.zeros(3, np.uint32)), "does not hold 16 numbers"),
    ("pcodec of floats", "tokens", pcodec(np.zeros(SEQ_LENGTH, np.float32)), "cannot be decompressed"),
    ("no pcodec", "tokens", b"pco!" * 9, "cannot be decompressed"),
    ("a chunk larger than allowed", "tokens", bytes(10_000), "chunk of 10004 bytes|cannot be decompressed"),
)
for name, array, body, message in CHUNKS:
    CASES[f"chunk: {name}"] = (chunk(array, body), message)

for name, change in (
    ("across", lambda spans: spans.__setitem__((1, 0), spans[1, 0] - 1)),
    ("backwards", lambda spans: spans.__setitem__(slice(0, 2), spans[[1, 0]])),
    ("beyond", lambda spans: spans.__setitem__((3, 1), 1 << 20)),
    ("far beyond", lambda spans: spans.__setitem__((3, 0), 2**63)),
    ("round the corner", lambda spans: spans.__setitem__((0, 0), 2**64 - 8)),
    ("nowhere", lambda spans: spans.fill(2**64 - 1)),
):
    CASES[f"index: pointing {name}"] = (index(change), "damaged or belongs to another shard")

for name, change, message in (
    (
        "lengths",
        lambda r: r["lengths"].__setitem__((0, 0), r["lengths"][0, 0] + 1),
        "differs from its commit record|differs from its own objects",
    ),
    ("a length of 4 GiB", lambda r: r["lengths"].__setitem__((0, 0), 2**32 - 1), "chunk of 4294967295 bytes"),
    ("checksums of rows", lambda r: r["crcs"].__setitem__((0, 0), 1), "differs from its commit record"),
    ("sizes", lambda r: r["size"].__setitem__(0, 1), "bytes, not 1"),
    ("a size of 16 EiB", lambda r: r["size"].__setitem__(0, 2**64 - 1), "bytes, not 18446744073709551615"),
    ("digests", lambda r: r["sha256"].__setitem__(0, 0), "damaged or belongs to another shard"),
):
    CASES[f"commit record: wrong {name}"] = (lambda cache, change=change: commit(cache, {}, change), message)  # type: ignore[misc]


def table(group: str, name: str, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the documents of both copies of a group of tables."""

    def forge(cache: Path) -> None:
        for copy in {group, group.replace("ddk.codebook", "ddk.codebook-0-copy")}:
            edit(cache / copy / "zarr.json", change)

    CASES[f"{group}: {name}"] = (forge, message)


def content(group: str, name: str, values: np.ndarray, message: str) -> None:
    """Replace the values of a table, in both copies, and their digest."""

    def forge(cache: Path) -> None:
        table = np.atleast_2d(values)
        array = layout.RowArray(table.dtype.name, table.shape[1], "zstd")
        listed = {
            "dtype": values.dtype.name,
            "shape": list(values.shape),
            "sha256": sha256(values.tobytes()).hexdigest(),
        }
        for copy in {group, group.replace("ddk.codebook", "ddk.codebook-0-copy")}:
            (cache / copy / name / "c/0/0").write_bytes(shards.encode(table, array, len(table)))
            edit(cache / copy / "zarr.json", lambda tables: tables.update({name: listed}))

    CASES[f"{group}/{name}: {message[:40]}"] = (forge, message)


table(
    "ddk.codebook",
    "a table that leads out",
    "is not a valid name of a table|damaged",
    lambda t: t.update({"../x": t["step"]}),
)
table("ddk.codebook", "an unknown type", "step.dtype|dtype", lambda t: t["step"].update(dtype="object"))
table(
    "ddk.codebook",
    "a table of 1 TiB",
    "shape|at most",
    lambda t: t["common"].update(shape=[1 << 20, 1 << 20]),
)
table("ddk.codebook", "three dimensions", "shape", lambda t: t["common"].update(shape=[2, 2, 2]))
table(
    "ddk.codebook",
    "another digest",
    "sha256 does not match its content",
    lambda t: t["common"].update(sha256="0" * 64),
)
table("ddk.codebook", "no step", "the tables must be", lambda t: t.pop("step"))
content("ddk.codebook", "step", np.zeros(1, np.float32), "step must be above 0")
content("ddk.codebook", "step", np.full(1, np.nan, np.float32), "step must be above 0 and")
content("ddk.codebook", "common", np.zeros(VOCABULARY, np.int32), "every id once")
content("ddk.codebook", "common", np.arange(7, dtype=np.int32), "rankings must hold ids|not one of 300")
content("ddk.codebook", "rankings", np.full((1, 9), -1, np.int32), "rankings must hold ids of the vocabulary")
for shape in ((129, 1), (1, 2049)):  # with many more, coding one position would take gigabytes
    content("ddk.codebook", "rankings", np.zeros(shape, np.int32), "at most 128 of 2,048 ids")
    CASES[f"rankings of shape {shape}"] = CASES.pop("ddk.codebook/rankings: at most 128 of 2,048 ids")
for name, text in (
    ("expands to 1 GiB", b"[" + b" " * (1 << 27)),
    ("100,000 deep", b"[" * 100_000 + b"]" * 100_000),
    ("no JSON", b"{"),
    ("a list", b"[[], [], []]"),
    ("an infinite id", b'[[[1e999,"a"]],[]]'),
    ("no ASCII", '[[[0,"é"]],[]]'.encode()),
    ("4 million tokens", b"[[" + b'[0,""],' * (1 << 22) + b"[]],[]]"),
    ("4 million objects", b"[[" + b"{}," * (1 << 22) + b"[]],[]]"),
    ("another tokenizer", zlib.decompress(Vocabulary({"a": 0}, {}).compress())),
):
    content("ddk.vocabulary", "content", np.frombuffer(zlib.compress(text, 9), np.uint8), "vocabulary")
    CASES[f"vocabulary: {name}"] = CASES.pop("ddk.vocabulary/content: vocabulary")

# Links, pipes, devices, folders and huge files in place of files.
KINDS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a link": (lambda path, outside: path.symlink_to(outside), "is a link"),
    "a link to itself": (lambda path, outside: path.symlink_to(path), "levels of symbolic links"),
    "a pipe": (lambda path, outside: os.mkfifo(path), "is not a regular file"),
    "a device": (lambda path, outside: path.symlink_to("/dev/zero"), "is a link"),
    "a folder": (lambda path, outside: path.mkdir(), "is not a regular file"),
    "1 TiB of nothing": (
        lambda path, outside: path.touch() or os.truncate(path, 1 << 40),  # type: ignore[func-returns-value]
        "has 1,099,511,627,776 bytes, (fewer or )?more than|larger than it can be",
    ),
}
FILES = (
    "zarr.json",
    "code/zarr.json",
    f"{TRAIN}/tokens/c/0/0",
    f"{TRAIN}/commits/c/2/0",
    f"{TRAIN}/token_commits/c/0/0",
    f"{TRAIN}/codes/zarr.json",
    "ddk.vocabulary/content/c/0/0",
)
FOLDERS = ("code", TRAIN, f"{TRAIN}/tokens", f"{TRAIN}/tokens/c/0", "ddk.vocabulary")


def replaced(key: str, make: Callable[[Path, Path], object]) -> Change:
    def forge(cache: Path) -> None:
        path, outside = cache / key, cache.parent / "outside"
        path.rename(outside)
        make(path, outside)

    return forge


for kind, (make, message) in KINDS.items():
    for key in FILES:
        CASES[f"{key}: {kind}"] = (replaced(key, make), message)
for key in FOLDERS:
    CASES[f"{key}: a link to a folder"] = (replaced(key, KINDS["a link"][0]), "is a link")
