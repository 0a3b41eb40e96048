"""Caches as a stranger may have made them: every change fits the format's digests and seals where it can."""

import os
import zlib
from collections.abc import Callable, Mapping
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from cache_makers import SEQ_LENGTH, VOCABULARY, edit
from numcodecs.zstd import Zstd
from pcodec import ChunkConfig, standalone

from ddk_cache import layout, markers, shards
from ddk_cache.records import existing_manifest, split_arrays
from ddk_cache.storage import Storage
from ddk_cache.tables import codebook_digest, read_codebook
from ddk_cache.tokens import Vocabulary

Change = Callable[[Path], object]
Case = tuple[Change, str | None]  # what is done to the cache; what is said of it, None where no row is harmed
CASES: dict[str, Case] = {}

TRAIN = "code/train"


def seal(cache: Path, objects: Mapping[str, bytes], change: Callable[[Any], object] = lambda _: None) -> None:
    """Put the objects of code/train shard 0 there, under markers that vouch for them; ``change`` is made to
    the markers' records before they are sealed."""
    storage = Storage(str(cache))
    manifest = existing_manifest(storage)
    book = read_codebook(storage)
    assert book is not None
    names = list(split_arrays(manifest, "train"))
    for name, data in objects.items():
        (cache / layout.shard_key("code", "train", name, 0)).write_bytes(data)
    there = [(cache / layout.shard_key("code", "train", name, 0)).read_bytes() for name in names]
    for kind, count, digest in (
        (layout.MARKERS, len(names), codebook_digest(book)),
        (layout.TOKEN_MARKERS, 3, None),
    ):
        marker = markers.describe(there[:count], manifest.shard_rows, manifest.shard_rows)
        change(marker.records)
        packed = marker.pack(markers.place(manifest, "code", "train", 0, digest))
        (cache / layout.marker_key("code", "train", 0, kind)).write_bytes(packed)
    listed = cache / layout.seals_key("code", "train")
    listed.write_bytes(packed[-markers.SEAL :] + listed.read_bytes()[markers.SEAL :])
    known = sha256(listed.read_bytes()).hexdigest()
    edit(cache / "code" / "zarr.json", lambda state: state["train"].update(token_seals=known))


def rows(name: str, change: Callable[[np.ndarray], object]) -> Change:
    """Change the numbers of one array [R, width], all else being right."""

    def forge(cache: Path) -> None:
        manifest = existing_manifest(Storage(str(cache)))
        array = split_arrays(manifest, "train")[name]
        data = (cache / layout.shard_key("code", "train", name, 0)).read_bytes()
        values = shards.unpack(data, array, manifest.shard_rows, manifest.shard_rows).copy()
        change(values)
        seal(cache, {name: shards.pack(values, array, manifest.shard_rows)})

    return forge


def at(*place: int, value: float) -> Callable[[np.ndarray], object]:
    return lambda values: values.__setitem__(place, value)


def chunk(name: str, body: bytes) -> Change:
    """Put a compressed chunk in the place of an array's first row."""

    def forge(cache: Path) -> None:
        data = (cache / layout.shard_key("code", "train", name, 0)).read_bytes()
        R = existing_manifest(Storage(str(cache))).shard_rows
        ends = np.cumsum(shards.chunk_lengths(data[-shards.tail_length(R) :], R)).tolist()
        rest = [data[start:end] for start, end in pairwise(ends)]
        seal(cache, {name: shards.join([shards.seal(body), *rest], R)})

    return forge


def index(change: Callable[[np.ndarray], object]) -> Change:
    """Change the index, uint64 [R, 2], of an array's shard."""

    def forge(cache: Path) -> None:
        path = cache / layout.shard_key("code", "train", "codes", 0)
        data, R = path.read_bytes(), existing_manifest(Storage(str(cache))).shard_rows
        spans = np.frombuffer(data[-shards.tail_length(R) : -4], "<u8").reshape(R, 2).copy()
        change(spans)
        whole = data[: -shards.tail_length(R)] + shards.seal(spans.tobytes())
        path.write_bytes(whole)

    return forge


def documents(name: str, raw: bytes, said: str = "damaged") -> None:
    """The same bytes as each of the documents that are read first."""
    for key in ("zarr.json", "code/zarr.json"):
        CASES[f"{key}: {name}"] = (lambda cache, key=key: (cache / key).write_bytes(raw), said)  # type: ignore[misc]


def attribute(text: str) -> bytes:
    return b'{"zarr_format": 3, "node_type": "group", "attributes": {"ddk_cache": ' + text.encode() + b"}}"


# Documents that are none.
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


def manifest(name: str, said: str, **changes: object) -> None:
    CASES[f"manifest: {name}"] = (lambda cache: edit(cache / "zarr.json", lambda m: m.update(changes)), said)


def domain_named(name: str) -> None:
    CASES[f"a domain named {name[:20]!r}"] = (
        lambda cache: edit(cache / "zarr.json", lambda m: m["domains"][0].update(name=name)),
        "domains.0.name",
    )


manifest("another format", "is not a ddk-cache cache", format="tar")
manifest("a version to come", "format version 3", version=3)
manifest("a version in words", "format version 'two'", version="two")
manifest("no rows a shard", "shard_rows", shard_rows=0)
manifest("shards of 2^40 rows", "shard_rows", shard_rows=1 << 40)
manifest("shards of 2^40 tokens", "at most 268,435,456 tokens", shard_rows=1 << 20, seq_length=1 << 20)
manifest("rows of one token", "seq_length", seq_length=1)
manifest("rows of 2^40 tokens", "seq_length", seq_length=1 << 40)
manifest(
    "rows of 2^32 entries", "seq_length x entries", shard_rows=1, seq_length=1 << 20, target={"top_k": 4096}
)
manifest("other rows", "belongs to another domain or another cache", seq_length=17)
manifest("a vocabulary of 2^40", "vocab_size", vocab_size=1 << 40)
manifest("no vocabulary", "vocab_size", vocab_size=0)
manifest("a target of its own", "target.kind", target={"kind": "pickle"})
manifest("a billion entries", "target.top_k", target={"top_k": 10**9})
manifest("no temperature", "target.temperature", target={"temperature": 0})
manifest("an infinite seed", "seed", seed=1.5)
manifest("a fingerprint that is none", "tokenizer_hash", tokenizer_hash="x" * 64)
manifest("no domains", "domains", domains=[])
manifest("no teachers", "teachers", teachers=[])
manifest("a key of its own", "unknown key", run="ls")
manifest(
    "2,000 domains",
    "domains",
    domains=[{"name": f"d{n}", "source": {}, "max_tokens": None, "teacher": 0} for n in range(2000)],
)
manifest(
    "two domains of one name",
    "two domains have the same name",
    domains=[{"name": "code", "source": {}, "max_tokens": None, "teacher": 0}] * 2,
)
manifest(
    "a teacher that is not there",
    "a domain's teacher is not among the teachers",
    domains=[{"name": "code", "source": {}, "max_tokens": None, "teacher": 63}],
)
manifest("another overlap", "belongs to another domain", overlap=3)
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


def state(name: str, said: str | None, change: Callable[[dict[str, Any]], object]) -> None:
    CASES[f"state: {name}"] = (lambda cache: edit(cache / "code/zarr.json", change), said)


state("10^9 train rows", "shard", lambda s: s["train"].update(rows=10**6))
state("2^39 train rows", "more than 1,048,576 shards", lambda s: s["train"].update(rows=1 << 39))
state("2^39 validation rows", "more than 1,048,576 shards", lambda s: s["validation"].update(rows=1 << 39))
state("2^41 rows", "train.rows", lambda s: s["train"].update(rows=1 << 41))
state("rows below 0", "train.rows", lambda s: s["train"].update(rows=-1))
state("half a row", "train.rows", lambda s: s["train"].update(rows=0.5))
state("too few rows", "rows, not", lambda s: s["train"].update(rows=9))
state(
    "tokens that are not there", "counts in the attributes are wrong", lambda s: s["train"].update(tokens=125)
)
state("more tokens than rows hold", "train.tokens: are more", lambda s: s["train"].update(tokens=161))
state("more labels than tokens", "train.labels: are more", lambda s: s["train"].update(labels=121))
state("nothing to validate on", "validation.labels", lambda s: s["validation"].update(labels=0))
state(
    "labels that are not there", "counts in the attributes are wrong", lambda s: s["train"].update(labels=1)
)
state(
    "another cross-entropy", "cross-entropy in the attributes", lambda s: s.update(teacher_cross_entropy=0.5)
)
state("a cross-entropy below 0", "teacher_cross_entropy", lambda s: s.update(teacher_cross_entropy=-1))
state("a cross-entropy of 701", "teacher_cross_entropy", lambda s: s.update(teacher_cross_entropy=701))
state("no limits", "limits", lambda s: s.update(limits=[]))
state("counts that are words", "skipped", lambda s: s.update(skipped={"empty": "many"}))
state("no binding", "belongs to another domain or another cache", lambda s: s.pop("binding"))
state("an unknown key", "unknown key", lambda s: s.update(run="ls"))
state("reasons that move the cursor", None, lambda s: s.update(skipped={"\x1b[2J\x1b]0;x\x07\u202e": 3}))

# Tokens, masks and answers that contradict each other, each under a marker that fits.
LAST = SEQ_LENGTH - 1
for name, array, change, said in (
    ("a token beyond the vocabulary", "tokens", at(0, 0, value=VOCABULARY), "not in the vocabulary"),
    ("the largest token", "tokens", at(0, 0, value=2**32 - 1), "not in the vocabulary"),
    ("segments that begin with 2", "segments", at(0, 0, value=2), "segments are not in order"),
    ("segments that go back", "segments", at(0, 9, value=1), "segments are not in order"),
    ("segments behind the padding", "segments", at(0, LAST, value=3), "segments are not in order"),
    ("a mask of 2", "loss_mask", at(0, 0, value=2), "loss mask has values"),
    ("a label across documents", "loss_mask", at(0, 7, value=1), "without a label in its document"),
    ("a label in the padding", "loss_mask", at(0, LAST, value=1), "without a label in its document"),
    ("a mask without entries", "loss_mask", at(0, 0, value=0), "stands where no label is|entries stand"),
    ("a label of NaN", "label_logprob", at(0, 0, value=np.nan), "no log-probability"),
    ("a label of infinity", "label_logprob", at(0, 0, value=-np.inf), "no log-probability"),
    ("a label above 0", "label_logprob", at(0, 0, value=0.5), "no log-probability"),
    ("an answer without a label", "label_logprob", at(0, LAST, value=-1), "where no label is"),
    ("too many entries", "entries", at(0, 0, value=6), "entries, more than 5"),
    ("the most entries", "entries", at(0, 0, value=65535), "entries, more than 5"),
    ("entries in the padding", "entries", at(0, LAST, value=1), "entries stand elsewhere"),
    ("no entries", "entries", at(0, 0, value=0), "entries stand elsewhere"),
    ("a ranking that is not there", "rankings", at(0, 0, value=60000), "out of range"),
    ("a code beyond the vocabulary", "codes", at(0, 0, value=2**31), "out of range"),
    ("the largest code", "codes", at(0, 0, value=2**32 - 1), "out of range"),
    ("one id twice", "codes", at(0, slice(0, 50), value=5), "an id twice|out of range"),
    ("gaps out of range", "gaps", at(0, slice(0, 40), value=65535), "a level is out of range"),
    ("a tail out of range", "tail", at(0, 0, value=1), "a level is out of range"),
):
    CASES[f"rows: {name}"] = (rows(array, change), said)

# Chunks that would expand, or are none.
BOMB = np.zeros(1 << 26, np.uint8)
FRAME = bytes(Zstd(level=3).encode(np.zeros(SEQ_LENGTH, np.uint8)))
for name, array, body, said in (
    ("zstd of 64 MiB", "loss_mask", bytes(Zstd(level=3).encode(BOMB)), "expands to 67108864 bytes"),
    (
        "zstd that claims 1 TiB",
        "loss_mask",
        FRAME[:4] + b"\xe0" + (1 << 40).to_bytes(8, "little"),
        "expands to",
    ),
    (
        "zstd that does not say",
        "loss_mask",
        FRAME[:4] + bytes([FRAME[4] & 0x1F]) + FRAME[5:],
        "expands to None",
    ),
    ("zstd of too few", "loss_mask", bytes(Zstd(level=3).encode(BOMB[:3])), "expands to 3 bytes"),
    ("no zstd", "loss_mask", b"zstd" * 9, "no zstd frame"),
    ("nothing", "loss_mask", b"", "no zstd frame"),
    (
        "pcodec of 16 MiB",
        "tokens",
        bytes(standalone.simple_compress(BOMB.view(np.uint32)[: 1 << 22], ChunkConfig())),
        "does not hold 16 numbers",
    ),
    (
        "pcodec of too few",
        "tokens",
        bytes(standalone.simple_compress(np.zeros(3, np.uint32), ChunkConfig())),
        "does not hold 16 numbers",
    ),
    (
        "pcodec of another type",
        "tokens",
        bytes(standalone.simple_compress(np.zeros(SEQ_LENGTH, np.float32), ChunkConfig())),
        "cannot be decompressed",
    ),
    ("no pcodec", "tokens", b"pco!" * 9, "cannot be decompressed"),
    ("a chunk larger than it can be", "tokens", bytes(10_000), "chunk of 10004 bytes|cannot be decompressed"),
):
    CASES[f"chunk: {name}"] = (chunk(array, body), said)

for name, change in (
    ("across", lambda spans: spans.__setitem__((1, 0), spans[1, 0] - 1)),
    ("backwards", lambda spans: spans.__setitem__(slice(0, 2), spans[[1, 0]])),
    ("beyond", lambda spans: spans.__setitem__((3, 1), 1 << 20)),
    ("far beyond", lambda spans: spans.__setitem__((3, 0), 2**63)),
    ("round the corner", lambda spans: spans.__setitem__((0, 0), 2**64 - 8)),
    ("nowhere", lambda spans: spans.fill(2**64 - 1)),
):
    CASES[f"index: pointing {name}"] = (index(change), "damaged or another shard's")

for name, change, said in (
    (
        "lengths",
        lambda r: r["lengths"].__setitem__((0, 0), r["lengths"][0, 0] + 1),
        "another than the marker|contradicts",
    ),
    ("a length of 4 GiB", lambda r: r["lengths"].__setitem__((0, 0), 2**32 - 1), "chunk of 4294967295 bytes"),
    ("checksums of rows", lambda r: r["crcs"].__setitem__((0, 0), 1), "another than the marker vouches for"),
    ("sizes", lambda r: r["size"].__setitem__(0, 1), "bytes, not 1"),
    ("a size of 16 EiB", lambda r: r["size"].__setitem__(0, 2**64 - 1), "bytes, not 18446744073709551615"),
    ("digests", lambda r: r["sha256"].__setitem__(0, 0), "damaged or another shard's"),
):
    CASES[f"marker: {name} that are none"] = (lambda cache, change=change: seal(cache, {}, change), said)  # type: ignore[misc]


def table(group: str, name: str, said: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change what both copies of a group of tables say of themselves."""

    def forge(cache: Path) -> None:
        for place in {group, group.replace("ddk.codebook", "ddk.codebook-0-copy")}:
            edit(cache / place / "zarr.json", change)

    CASES[f"{group}: {name}"] = (forge, said)


def content(group: str, name: str, values: np.ndarray, said: str) -> None:
    """Put other values into a table, in both copies, with the digest that fits."""

    def forge(cache: Path) -> None:
        two = np.atleast_2d(values)
        array = layout.RowArray(two.dtype.name, two.shape[1], "zstd")
        listed = {
            "dtype": values.dtype.name,
            "shape": list(values.shape),
            "sha256": sha256(values.tobytes()).hexdigest(),
        }
        for place in {group, group.replace("ddk.codebook", "ddk.codebook-0-copy")}:
            (cache / place / name / "c/0/0").write_bytes(shards.pack(two, array, len(two)))
            edit(cache / place / "zarr.json", lambda tables: tables.update({name: listed}))

    CASES[f"{group}/{name}: {said[:40]}"] = (forge, said)


table(
    "ddk.codebook",
    "a table that leads out",
    "no table has such a name|damaged",
    lambda t: t.update({"../x": t["step"]}),
)
table("ddk.codebook", "a type of its own", "step.dtype|dtype", lambda t: t["step"].update(dtype="object"))
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
    "not what its sha256 says",
    lambda t: t["common"].update(sha256="0" * 64),
)
table("ddk.codebook", "no step", "the tables must be", lambda t: t.pop("step"))
content("ddk.codebook", "step", np.zeros(1, np.float32), "step must be above 0")
content("ddk.codebook", "step", np.full(1, np.nan, np.float32), "step must be above 0 and")
content("ddk.codebook", "common", np.zeros(VOCABULARY, np.int32), "every id once")
content("ddk.codebook", "common", np.arange(7, dtype=np.int32), "rankings must hold ids|not one of 300")
content("ddk.codebook", "rankings", np.full((1, 9), -1, np.int32), "rankings must hold ids of the vocabulary")
for name, text in (
    ("expands to 1 GiB", b"[" + b" " * (1 << 27)),
    ("100,000 deep", b"[" * 100_000 + b"]" * 100_000),
    ("no JSON", b"{"),
    ("a list", b"[[], [], []]"),
    ("another tokenizer", zlib.decompress(Vocabulary({"a": 0}, {}).pack())),
):
    content("ddk.vocabulary", "content", np.frombuffer(zlib.compress(text, 9), np.uint8), "vocabulary")
    CASES[f"vocabulary: {name}"] = CASES.pop("ddk.vocabulary/content: vocabulary")

# What is no file of the folder's own.
KINDS: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "a link": (lambda path, outside: path.symlink_to(outside), "is a link"),
    "a link to itself": (lambda path, outside: path.symlink_to(path), "is a link"),
    "a pipe": (lambda path, outside: os.mkfifo(path), "is not a regular file"),
    "a device": (lambda path, outside: path.symlink_to("/dev/zero"), "is a link"),
    "a folder": (lambda path, outside: path.mkdir(), "is not a regular file"),
    "1 TiB of nothing": (
        lambda path, outside: path.touch() or os.truncate(path, 1 << 40),  # type: ignore[func-returns-value]
        "has 1,099,511,627,776 bytes, more than|larger than it can be",
    ),
}
FILES = (
    "zarr.json",
    "code/zarr.json",
    f"{TRAIN}/tokens/c/0/0",
    f"{TRAIN}/markers/c/2/0",
    f"{TRAIN}/token_markers/c/0/0",
    f"{TRAIN}/token_seals/c/0/0",
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


for kind, (make, said) in KINDS.items():
    for key in FILES:
        CASES[f"{key}: {kind}"] = (replaced(key, make), said)
for key in FOLDERS:
    CASES[f"{key}: a link to a folder"] = (replaced(key, KINDS["a link"][0]), "is a link")
