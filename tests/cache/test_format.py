"""docs/format.md is enough: a reader of zarr and numpy alone, step by step, agrees with the library's."""

import json
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
    for split in ("train", "validation"):
        markers: Any = plain[f"code/{split}/markers"]
        assert markers.shape[0] == -(-state[split]["rows"] // SHARD_ROWS)
        assert set(markers.attrs["arrays"]) | {"markers"} == set(plain[f"code/{split}"].array_keys())
        for shard, described in enumerate(markers[:].tolist()):
            for name, (checksum, size) in zip(markers.attrs["arrays"], described, strict=True):
                data = (cache_folder / f"code/{split}/{name}/c/{shard}/0").read_bytes()
                assert (google_crc32c.value(data), len(data)) == (checksum, size)
    content: Any = plain["ddk.vocabulary/content"]
    text = zlib.decompress(content[0].tobytes())
    assert sha256(text).hexdigest() == manifest["tokenizer_hash"]
    assert json.loads(text)[0][3] == [3, "token3"]
    codebook: Any = plain["ddk.codebook"].attrs["ddk_cache"]
    assert {name: table["dtype"] for name, table in codebook.items()} == {
        "step": "float32",
        "common": "int32",
        "rankings": "int32",
    }
