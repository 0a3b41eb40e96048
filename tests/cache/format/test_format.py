"""docs/format.md is enough: a reader made from it alone agrees with the library's."""

import json
import struct
import zipfile
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from helpers.caches import SHARD_ROWS, VOCABULARY_MAP, make_manifest, write_domain
from helpers.plain_reader import Reader

import ddk_cache
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer

KINDS: dict[str, dict[str, Any]] = {
    "topk": {"kind": "topk", "top_k": 5},
    "topp": {"kind": "topk", "top_k": 40, "top_p": 0.5},
    "sampled": {"kind": "sampled", "samples": 7},
    "label": {"kind": "label"},
}
DATA = Path(__file__).parent / "data"
ROWS = range(10)


def check_reader(folder: Path) -> None:
    """Compare the plain reader and the library's on a cache of one domain."""
    plain, cache = Reader(folder), ddk_cache.open_cache(str(folder))
    rows = cache["code"].train.read(ROWS)
    for row in ROWS:
        for name in ("tokens", "segments", "loss_mask", "label_logprob"):
            array = plain.array("code", "train", name, row)
            np.testing.assert_array_equal(array, getattr(rows, name)[row])
        if rows.ids is None:
            continue
        assert rows.logprobs is not None
        assert rows.tail_logprob is not None
        for position, expected in enumerate(plain.targets("code", "train", row)):
            present = rows.ids[row, position] >= 0
            assert expected.ids == rows.ids[row, position, present].tolist()
            np.testing.assert_allclose(rows.logprobs[row, position, present], expected.logprobs, atol=1e-5)
            np.testing.assert_allclose(rows.tail_logprob[row, position], expected.tail_logprob, atol=1e-5)
            assert bool(expected.ids) == rows.loss_mask[row, position]


@pytest.mark.parametrize("kind", KINDS)
def test_a_reader_made_from_the_page(tmp_path: Path, kind: str) -> None:
    manifest = make_manifest("code", target=KINDS[kind])
    with open_writer(str(tmp_path / "cache"), manifest, VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    check_reader(tmp_path / "cache")


@pytest.mark.parametrize("kind", KINDS)
def test_vectors(tmp_path: Path, kind: str) -> None:
    """Caches that this version's first writer left: they are read to the same rows as then."""
    with zipfile.ZipFile(DATA / f"v3_{kind}.zip") as archive:
        archive.extractall(tmp_path / "cache")
    check_reader(tmp_path / "cache")
    rows = ddk_cache.open_cache(str(tmp_path / "cache"))["code"].train.read(ROWS)
    with np.load(DATA / f"v3_{kind}_rows.npz") as expected:
        assert set(expected) == set(rows.arrays())
        for name, array in expected.items():
            np.testing.assert_array_equal(getattr(rows, name), array)
    assert list(verify(str(tmp_path / "cache"))) == []


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_fingerprint(manifest: dict[str, Any], domain: str) -> str:
    """Return the domain fingerprint."""
    keys = (
        "format",
        "version",
        "tokenizer_hash",
        "vocab_size",
        "target",
        "seq_length",
        "shard_rows",
        "seed",
        "validation_targets",
        "overlap",
    )
    cache = sha256(canonical({key: manifest[key] for key in keys})).hexdigest()
    (source,) = (source for source in manifest["domains"] if source["name"] == domain)
    teacher = manifest["teachers"][source["teacher_index"]]
    parts = {
        "cache": cache,
        "domain": domain,
        "build_id": source["build_id"],
        "source": source["source"],
        "teacher": {key: value for key, value in teacher.items() if key != "engine_version"},
    }
    return sha256(canonical(parts)).hexdigest()


def check_record(record: bytes, identity: bytes, objects: list[bytes], shard_rows: int) -> None:
    """Return a commit record's bytes, one after another."""
    body, digest = record[:-32], record[-32:]
    assert sha256(identity + body).digest() == digest
    rows, *_ = struct.unpack_from("<Q", body)
    offset = 8
    for data in objects:
        size, digest = struct.unpack_from("<Q32s", body, offset)
        lengths = struct.unpack_from(f"<{rows}I", body, offset + 40)
        crcs = struct.unpack_from(f"<{rows}I", body, offset + 40 + 4 * shard_rows)
        offset += 40 + 8 * shard_rows
        assert (len(data), sha256(data).digest()) == (size, digest)
        start = 0
        for length, crc in zip(lengths, crcs, strict=True):
            chunk = data[start : start + length]
            assert google_crc32c.value(chunk[:-4]) == crc == int.from_bytes(chunk[-4:], "little")
            start += length
    assert offset == len(body)


def test_state_records_and_vocabulary_are_as_the_page_says(cache_folder: Path) -> None:
    plain = zarr.open_group(str(cache_folder), mode="r")
    manifest: Any = plain.attrs["ddk_cache"]
    assert [domain["name"] for domain in manifest["domains"]] == ["code", "prose"]
    assert manifest["version"] == 3
    state: Any = plain["code"].attrs["ddk_cache"]
    assert state["complete"]
    assert (
        state["teacher_cross_entropy"]
        == ddk_cache.open_cache(str(cache_folder))["code"].teacher_cross_entropy
    )
    fingerprint = read_fingerprint(manifest, "code")
    assert state["fingerprint"] == fingerprint
    assert state["build_id"] == manifest["domains"][0]["build_id"]
    codebook: Any = plain["ddk.codebook"].attrs["ddk_cache"]
    for split in ("train", "validation"):
        rows = state[split]["rows"]
        for kind in ("token_commits", "commits"):
            records: Any = plain[f"code/{split}/{kind}"]
            assert records.shape[0] == -(-rows // SHARD_ROWS)
            has_entries = kind == "commits" and split == "train"
            for shard in range(records.shape[0]):
                identity = {
                    "fingerprint": fingerprint,
                    "split": split,
                    "shard": shard,
                    "codebook": codebook["sha256"] if has_entries else None,
                }
                objects = [
                    (cache_folder / f"code/{split}/{name}/c/{shard}/0").read_bytes()
                    for name in records.attrs["arrays"]
                ]
                check_record(records[shard].tobytes(), canonical(identity), objects, min(rows, SHARD_ROWS))
    content: Any = plain["ddk.vocabulary/content"]
    text = zlib.decompress(content[0].tobytes())
    assert sha256(text).hexdigest() == manifest["tokenizer_hash"]
    assert json.loads(text)[0][3] == [3, "token3"]
    digests = {name: table["sha256"] for name, table in codebook.items() if name != "sha256"}
    tables: Any = plain["ddk.codebook"]
    assert digests == {name: sha256(array[:].tobytes()).hexdigest() for name, array in tables.arrays()}
    copy: Any = plain["ddk.codebook-0-copy"].attrs["ddk_cache"]
    assert copy == codebook
    for attribute in (manifest, state, codebook):
        content = {key: value for key, value in attribute.items() if key != "sha256"}
        assert sha256(canonical(content)).hexdigest() == attribute["sha256"]
