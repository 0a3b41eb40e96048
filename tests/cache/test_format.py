"""docs/format.md is enough: a reader of zarr and numpy alone, step by step, agrees with the library's."""

import json
import struct
import zlib
from hashlib import sha256
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import zarr
from cache_makers import SHARD_ROWS, VOCABULARY_MAP, make_manifest, write_domain

import ddk_cache
from ddk_cache.writer import open_writer

Position = dict[int, float]  # id to log-probability

TARGETS = [
    {"kind": "topk", "top_k": 5},
    {"kind": "topk", "top_k": 40, "top_p": 0.5},
    {"kind": "sampled", "samples": 7},
]


def read_row(cache: Any, domain: str, row: int) -> list[tuple[Position, float]]:
    """Entries and tail of each position of a train row."""
    manifest = cache.attrs["ddk_cache"]
    target, length = manifest["target"], manifest["seq_length"]
    is_sampled = target["kind"] == "sampled"
    width = target["samples"] if is_sampled else target["top_k"]
    split = cache[f"{domain}/train"]
    codebook = cache["ddk.codebook"]
    step, common, rankings = codebook["step"][0, 0], codebook["common"][0], codebook["rankings"][:]
    M = rankings.shape[1]
    entries, ranking = split["entries"][row], split["rankings"][row]
    tail = None if is_sampled else split["tail"][row]

    # 1. Lay out: the ranks one after another, each over the positions that have an entry of it.
    gap = np.zeros((length, width), np.int64)
    code = np.zeros((length, width), np.int64)
    gaps, codes = iter(split["gaps"][row].tolist()), iter(split["codes"][row].tolist())
    for rank in range(width):
        for position in np.flatnonzero(entries > rank):
            gap[position, rank] = next(gaps) if rank else 0
            code[position, rank] = next(codes)

    found: list[tuple[Position, float]] = []
    for position in range(length):
        n = int(entries[position])
        if n == 0:
            found.append(({}, -np.inf))
            continue
        level = gap[position, :n].cumsum()  # 2.
        for rank in range(1, n):  # 3.
            if gap[position, rank] == 0:
                code[position, rank] += code[position, rank - 1]
        c = ranking[position]
        ids = [int(rankings[c, x] if x < M else common[x - M]) for x in code[position, :n]]  # 4.
        if is_sampled:  # 5b.
            best, remainder = divmod(target["samples"] + level.sum(), n)
            assert remainder == 0
            logprobs, tail_logprob = np.log((best - level) / target["samples"]), -np.inf
        else:  # 5a.
            logs, tail_log = -float(step) * level, -np.inf
            if tail[position]:
                tail_log = -float(step) * (level[-1] + int(tail[position]) - 32768)
            total = np.log(np.exp(logs).sum() + np.exp(tail_log))
            logprobs, tail_logprob = logs - total, tail_log - total
        found.append((dict(zip(ids, logprobs.tolist(), strict=True)), float(tail_logprob)))
    return found


@pytest.mark.parametrize("target", TARGETS, ids=str)
def test_a_reader_made_from_the_page(tmp_path: Path, target: dict[str, object]) -> None:
    folder = str(tmp_path / "cache")
    with open_writer(folder, make_manifest("code", target=target), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    plain, cache = zarr.open_group(folder, mode="r"), ddk_cache.open_cache(folder)
    split = plain["code/train"]
    for number in (0, 5, 9):
        rows = cache["code"].train.read([number])
        assert (rows.tokens[0] == split["tokens"][number]).all()
        assert (rows.segments[0] == split["segments"][number]).all()
        assert (rows.loss_mask[0] == split["loss_mask"][number]).all()
        assert (rows.label_logprob[0] == split["label_logprob"][number]).all()
        assert rows.ids is not None
        assert rows.logprobs is not None
        assert rows.tail_logprob is not None
        for position, (entries, tail) in enumerate(read_row(plain, "code", number)):
            there = rows.ids[0, position] >= 0
            assert rows.ids[0, position, there].tolist() == list(entries)
            np.testing.assert_allclose(rows.logprobs[0, position, there], list(entries.values()), atol=1e-5)
            np.testing.assert_allclose(rows.tail_logprob[0, position], tail, atol=1e-5)
            assert bool(entries) == rows.loss_mask[0, position]


def canonical(content: Any) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def read_binding(manifest: dict[str, Any], domain: str) -> str:
    """What ties a domain to its cache."""
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
    (found,) = (source for source in manifest["domains"] if source["name"] == domain)
    teacher = manifest["teachers"][found["teacher"]]
    parts = {
        "cache": cache,
        "domain": domain,
        "source": found["source"],
        "teacher": {key: value for key, value in teacher.items() if key != "engine_version"},
    }
    return sha256(canonical(parts)).hexdigest()


def check_marker(marker: bytes, place: bytes, objects: list[bytes]) -> None:
    """The marker's bytes, one after another."""
    body, seal = marker[:-32], marker[-32:]
    assert sha256(place + body).digest() == seal
    rows, *_ = struct.unpack_from("<Q", body)
    at = 8
    for data in objects:
        size, digest = struct.unpack_from("<Q32s", body, at)
        lengths = struct.unpack_from(f"<{rows}I", body, at + 40)
        crcs = struct.unpack_from(f"<{rows}I", body, at + 40 + 4 * SHARD_ROWS)
        at += 40 + 8 * SHARD_ROWS
        assert (len(data), sha256(data).digest()) == (size, digest)
        start = 0
        for length, crc in zip(lengths, crcs, strict=True):
            chunk = data[start : start + length]
            assert google_crc32c.value(chunk[:-4]) == crc == int.from_bytes(chunk[-4:], "little")
            start += length
    assert at == len(body)


def test_state_markers_and_vocabulary_are_as_the_page_says(cache_folder: Path) -> None:
    plain = zarr.open_group(str(cache_folder), mode="r")
    manifest: Any = plain.attrs["ddk_cache"]
    assert [domain["name"] for domain in manifest["domains"]] == ["code", "prose"]
    assert manifest["version"] == 2
    state: Any = plain["code"].attrs["ddk_cache"]
    assert state["complete"]
    assert (
        state["teacher_cross_entropy"]
        == ddk_cache.open_cache(str(cache_folder))["code"].teacher_cross_entropy
    )
    binding = read_binding(manifest, "code")
    assert state["binding"] == binding
    codebook: Any = plain["ddk.codebook"].attrs["ddk_cache"]
    for split in ("train", "validation"):
        for kind in ("token_markers", "markers"):
            markers: Any = plain[f"code/{split}/{kind}"]
            assert markers.shape[0] == -(-state[split]["rows"] // SHARD_ROWS)
            has_entries = kind == "markers" and split == "train"
            for shard in range(markers.shape[0]):
                place = {
                    "binding": binding,
                    "split": split,
                    "shard": shard,
                    "codebook": codebook["sha256"] if has_entries else None,
                }
                check_marker(
                    markers[shard].tobytes(),
                    canonical(place),
                    [
                        (cache_folder / f"code/{split}/{name}/c/{shard}/0").read_bytes()
                        for name in markers.attrs["arrays"]
                    ],
                )
    content: Any = plain["ddk.vocabulary/content"]
    text = zlib.decompress(content[0].tobytes())
    assert sha256(text).hexdigest() == manifest["tokenizer_hash"]
    assert json.loads(text)[0][3] == [3, "token3"]
    digests = {name: table["sha256"] for name, table in codebook.items() if name != "sha256"}
    assert digests == {
        name: sha256(array[:].tobytes()).hexdigest() for name, array in plain["ddk.codebook"].arrays()
    }
    copy: Any = plain["ddk.codebook-0-copy"].attrs["ddk_cache"]
    assert copy == codebook
    for attribute in (manifest, state, codebook):
        content = {key: value for key, value in attribute.items() if key != "sha256"}
        assert sha256(canonical(content)).hexdigest() == attribute["sha256"]
