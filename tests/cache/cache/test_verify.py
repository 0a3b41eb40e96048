"""verify finds every change, and the next build writes only the changed shards again."""

import itertools
import json
import random
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers.caches import (
    ROWS,
    SEQ_LENGTH,
    VOCABULARY_MAP,
    edit,
    make_answers,
    make_manifest,
    make_rows,
    read_files,
    write_domain,
    write_shard,
)

import ddk_cache
from ddk_cache.cache import verify_shard
from ddk_cache.cache.info import as_text, info
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer
from ddk_cache.errors import CacheError, UnreachableError
from ddk_cache.format import codec, layout
from ddk_cache.storage import lock
from ddk_cache.storage.lock import LOCK_KEY
from ddk_cache.storage.storage import Storage


def objects(cache: Path) -> list[Path]:
    """Every object of every array: the shards and their commit records."""
    return sorted(path for path in cache.rglob("*") if path.is_file() and path.name != "zarr.json")


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(bytes(data))


def locations(cache: Path) -> set[str]:
    return {problem.location for problem in verify(str(cache))}


def shard_of(cache: Path, path: Path) -> str:
    parts = path.relative_to(cache).parts
    return f"{parts[0]}/{parts[1]} shard {parts[4]}"


def test_a_whole_cache_has_no_problem(cache_folder: Path) -> None:
    assert list(verify(str(cache_folder))) == []


def test_shards_that_are_not_answered_yet_are_one_line(cache_folder: Path) -> None:
    """Where the domain says that it is finished, each is a problem of its own."""
    train = cache_folder / "code/train"
    for folder in train.iterdir():
        if folder.name not in ("tokens", "segments", "loss_mask", "token_commits", "zarr.json"):
            for shard in ("0", "1"):
                (folder / "c" / shard / "0").unlink()
    found = [str(problem) for problem in verify(str(cache_folder))]
    assert found == [f"code/train shard {shard}: has no answers" for shard in (0, 1)]
    assert [str(problem) for problem in verify(str(cache_folder))] == [
        "code/train: 2 shards not answered yet: run build"
    ]


def test_several_processes_find_the_same(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_cache.cache.verify.AT_ONCE", 1)
    path = next(path for path in objects(cache_folder) if "code/train/label_logprob/c/1" in str(path))
    flip(path, 70)
    advanced: list[int] = []
    problems = list(verify(str(cache_folder), advanced.append, processes=2))
    assert [problem.location for problem in problems] == [shard_of(cache_folder, path)]
    assert sum(advanced) > sum(path.stat().st_size for path in cache_folder.rglob("train/tokens/c/*/0"))


def test_any_flipped_bit_in_any_array_is_found_and_named(cache_folder: Path) -> None:
    chance = random.Random(0)
    whole = read_files(cache_folder)
    for path in objects(cache_folder):
        group = path.relative_to(cache_folder).parts[0]
        if group == "prose":
            continue
        flip(path, chance.randrange(8 * path.stat().st_size))
        problems = locations(cache_folder)
        assert problems == {group} if "." in group else problems == {shard_of(cache_folder, path)}
        for other, data in whole.items():  # verify drops the records of bad shards
            if not other.exists() or other == path or other.name == "zarr.json":
                other.write_bytes(data)


@pytest.mark.parametrize("harm", ["truncate", "remove", "empty"])
def test_objects_cut_short_or_missing_are_found_and_then_done_again(cache_folder: Path, harm: str) -> None:
    path = next(path for path in objects(cache_folder) if "code/train/label_logprob/c/1" in str(path))
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: -1 if harm == "truncate" else 0])
    if harm != "remove":  # build lists and finds missing objects; verify finds changed ones
        assert locations(cache_folder) == {"code/train shard 1"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == [1]
        assert writer.unfinished("prose", "train") == []
        assert writer.has_tokens("code")
    assert locations(cache_folder) == {"code/train shard 1"}


@pytest.mark.parametrize("name", ["tokens", "loss_mask", "token_commits", "codes"])
def test_build_writes_missing_objects_again(cache_folder: Path, name: str) -> None:
    (path,) = (path for path in objects(cache_folder) if f"code/train/{name}/c/1/" in str(path))
    path.unlink()
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == [1]
        assert writer.has_tokens("code") == (name == "codes")


def test_a_damaged_shard_is_done_again_to_the_same_bytes(cache_folder: Path) -> None:
    before = {path: path.read_bytes() for path in objects(cache_folder)}
    flip(next(path for path in before if "prose/train/label_logprob/c/2" in str(path)), 77)
    assert locations(cache_folder) == {"prose/train shard 2"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("prose", "train") == [2]
        assert writer.has_tokens("prose")
        answers = make_answers(make_rows(ROWS["train"], 2)["loss_mask"], writer.manifest.target, 2)
        write_shard(writer, "prose", "train", 2, answers)
    assert {path: path.read_bytes() for path in objects(cache_folder)} == before
    assert list(verify(str(cache_folder))) == []


@pytest.mark.parametrize("finder", ["verify", "build"])
def test_damaged_tokens_ask_for_tokenising_again(cache_folder: Path, finder: str) -> None:
    path = next(path for path in objects(cache_folder) if "code/train/tokens/c/0" in str(path))
    whole = path.read_bytes()
    flip(path, 99)
    if finder == "verify":
        assert locations(cache_folder) == {"code/train shard 0"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        if finder == "build":
            with pytest.raises(CacheError, match="tokens of code/train shard 0 are damaged: run build again"):
                writer.read_tokens("code", "train", 0)
        assert writer.unfinished("code", "train") == [0]
        assert not writer.has_tokens("code")
        rows = {name: values[:4] for name, values in make_rows(ROWS["train"], 1).items()}
        writer.write_tokens("code", "train", 0, rows)
        assert writer.has_tokens("code")
    assert path.read_bytes() == whole


def test_damaged_documents_are_found_and_mended(cache_folder: Path) -> None:
    before = read_files(cache_folder)
    path = cache_folder / "code" / "train" / "tokens" / "zarr.json"
    document = json.loads(path.read_text())
    document["shape"][0] += 1
    path.write_text(json.dumps(document))
    (cache_folder / "prose" / "validation" / "commits" / "zarr.json").unlink()
    assert locations(cache_folder) == {"code/train/tokens/zarr.json", "prose/validation/commits/zarr.json"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        for name in ("code", "prose"):
            writer.finalize_domain(name)
    assert read_files(cache_folder) == before


@pytest.mark.parametrize(
    ("split", "key", "value"),
    [
        ("train", "tokens", 119),
        ("train", "labels", 1),
        ("validation", "labels", 1),
        (None, "teacher_cross_entropy", 0.5),
    ],
)
def test_wrong_counts_in_the_attributes_are_found_and_put_right(
    cache_folder: Path, split: str | None, key: str, value: float
) -> None:
    before = read_files(cache_folder)
    edit(cache_folder / "code" / "zarr.json", lambda s: (s[split] if split else s).update({key: value}))
    assert locations(cache_folder) == {f"code/{split}" if split else "code"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        writer.finalize_domain("code")
    assert read_files(cache_folder) == before


def test_info_counts_what_is_on_disk(cache_folder: Path) -> None:
    facts = info(str(cache_folder))
    assert facts["complete"]
    assert facts["bytes"] == sum(path.stat().st_size for path in cache_folder.rglob("*") if path.is_file())
    train = facts["domains"]["code"]["train"]
    folder = cache_folder / "code" / "train"
    assert train["bytes"] == sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    tokens = sum(path.stat().st_size for path in (folder / "tokens").rglob("*") if path.is_file())
    assert train["bytes_by_array"]["tokens"] == tokens
    assert train["bytes_per_token"] == train["bytes"] / (ROWS["train"] * 12)
    assert train["shards_done"] == train["shards"] == 3
    assert json.loads(json.dumps(facts)) == facts
    assert "code" in as_text(facts)
    (folder / "commits" / "c" / "1" / "0").unlink()
    assert info(str(cache_folder))["domains"]["code"]["train"]["shards_missing"] == [1]


@pytest.mark.parametrize("document", ["zarr.json", "code/zarr.json", f"{layout.CODEBOOK}/zarr.json"])
def test_fuzzed_documents_raise_nothing_but_cache_errors(cache_folder: Path, document: str) -> None:
    path = cache_folder / document
    whole = path.read_bytes()
    chance = random.Random(document)
    refused = 0
    for _ in range(100):
        data = bytearray(whole)
        for _ in range(chance.randint(1, 3)):
            offset = chance.randrange(len(data))
            match chance.randrange(4):
                case 0:
                    data[offset] = chance.randrange(256)
                case 1:
                    del data[offset : offset + chance.randint(1, 40)]
                case 2:
                    data[offset:offset] = bytes(data[: chance.randint(1, 40)])
                case _:
                    data[offset : offset + 1] = chance.choice(
                        [b"-1", b"null", b"1e999", b"[", b'"', b"99999999999999999999"]
                    )
        path.write_bytes(bytes(data))
        try:
            cache = ddk_cache.open_cache(str(cache_folder))
            for domain in cache.values():
                if len(domain.train):
                    domain.train.read([0, len(domain.train) - 1])
            info(str(cache_folder))
        except CacheError:
            refused += 1
    assert refused > 33 or document.startswith(layout.CODEBOOK), "the codebook has a copy"


def test_bytes_behind_a_table_are_found(cache_folder: Path) -> None:
    """Two copies one after another end with the same index as one."""
    path = cache_folder / "ddk.vocabulary" / "content" / "c" / "0" / "0"
    path.write_bytes(path.read_bytes() * 2)
    assert locations(cache_folder) == {"ddk.vocabulary"}


def test_a_store_that_does_not_answer_condemns_no_shard(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_files(cache_folder)
    original = Storage.read

    def read(self: Storage, key: str, *most: int) -> bytes | None:
        if key == "code/train/commits/c/1/0":
            raise UnreachableError(f"{key}: the connection was refused")
        return original(self, key, *most)

    monkeypatch.setattr(Storage, "read", read)
    with pytest.raises(UnreachableError, match="refused"):
        list(verify(str(cache_folder)))
    assert read_files(cache_folder) == before


def test_shards_without_objects_are_one_problem(cache_folder: Path) -> None:
    edit(cache_folder / "code" / "zarr.json", lambda state: state["train"].update(rows=10**6))
    with pytest.raises(CacheError, match=re.escape("code/train/commits/c/249999/0: is missing")):
        ddk_cache.open_cache(str(cache_folder))
    missing = info(str(cache_folder))["domains"]["code"]["train"]
    assert (missing["shards"], missing["shards_done"]) == (250_000, 3)
    assert missing["shards_missing"] == [*range(3, 1003)]
    problems = [str(problem) for problem in verify(str(cache_folder))]
    assert "code/train shard 3 and all others up to 249999: has no objects" in problems
    assert len(problems) < 20


def test_rows_of_many_entries_are_checked_one_by_one(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row may have 2^26 entries, which take 2 GiB decoded."""
    monkeypatch.setattr(verify_shard, "ENTRIES_AT_ONCE", 2 * SEQ_LENGTH * 5)
    counts = []
    decode = codec.decode

    def counted(arrays: Any, *rest: Any) -> Any:
        counts.append(len(arrays["entries"]))
        return decode(arrays, *rest)

    monkeypatch.setattr(codec, "decode", counted)
    assert not list(verify(str(cache_folder)))
    assert sorted(counts) == [2] * 10
    monkeypatch.setattr(verify_shard, "ENTRIES_AT_ONCE", 1)
    counts.clear()
    assert not list(verify(str(cache_folder)))
    assert counts == [1] * 20


def damaged_and_locked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flip a bit in a shard of each domain; leave the lock of a build that a power cut ended."""
    for domain in ("code", "prose"):
        flip(cache / domain / "train" / "codes" / "c" / "0" / "0", 30)
    held = {"token": "a" * 32, "heartbeat": 3, "grants": [], "folder": [1, 2], "boot": "another"}
    (cache / LOCK_KEY).write_text(json.dumps(held | {"host": "vm", "namespace": "pid:[1]", "process": 4242}))
    monkeypatch.setattr(lock, "STALE", 0.2)
    monkeypatch.setattr(lock, "POLL", 0.02)


def test_a_lock_from_before_a_reboot_does_not_keep_damage(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged_and_locked(cache_folder, monkeypatch)
    assert locations(cache_folder) == {"code/train shard 0", "prose/train shard 0"}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert [writer.unfinished(name, "train") for name in ("code", "prose")] == [[0], [0]]


def test_what_cannot_be_marked_is_a_problem(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    damaged_and_locked(cache_folder, monkeypatch)
    path, heartbeats = cache_folder / LOCK_KEY, itertools.count(4)

    def send_heartbeat(_: float) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"heartbeat": next(heartbeats)}))

    monkeypatch.setattr("ddk_cache.storage.lock.time.sleep", send_heartbeat)
    problems = [str(problem) for problem in verify(str(cache_folder))]
    assert [problem.partition(":")[0] for problem in problems] == [
        "code/train shard 0",
        "code",
        "prose/train shard 0",
        "prose",
    ]
    assert "code: is not marked as unfinished, so build will not repair it: " in problems[1]
    assert "another process (process 4242 on vm) is writing here" in problems[1]


def test_the_only_record_may_be_damaged_while_the_codebook_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a cache of one train shard no other record shows that the codebook fits."""
    monkeypatch.setitem(ROWS, "train", 4)
    cache = tmp_path / "cache"
    with open_writer(str(cache), make_manifest("code"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    before = read_files(cache)
    record = cache / "code" / "train" / "commits" / "c" / "0" / "0"
    size = record.stat().st_size
    for bit in (0, 8 * size // 2, 8 * (size - 30), 8 * size - 1):
        flip(record, bit)
        assert locations(cache) == {"code/train shard 0"}
        assert not record.exists()
        for path, data in before.items():
            path.write_bytes(data)


@pytest.mark.parametrize("name", ["codes", "commits"])
def test_without_the_codebook_only_the_damaged_shard_loses_its_record(cache_folder: Path, name: str) -> None:
    for group in layout.codebook_groups(0):
        shutil.rmtree(cache_folder / group)
    flip(cache_folder / "code" / "train" / name / "c" / "1" / "0", 99)
    problems = [str(problem) for problem in verify(str(cache_folder))]
    assert any("did not encode code: put it back" in problem for problem in problems)
    kept = [(cache_folder / f"code/train/commits/c/{shard}/0").exists() for shard in range(3)]
    assert kept == [True, False, True]


def test_large_objects_are_read_in_parts(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A shard may have 2^28 tokens with 64 entries, which take 20 GB."""
    original, largest = Storage.read_ranges, 0

    def read_ranges(self: Storage, ranges: Sequence[tuple[str, int, int]]) -> list[bytes]:
        nonlocal largest
        parts = original(self, ranges)
        largest = max(largest, sum(map(len, parts)))
        return parts

    monkeypatch.setattr(Storage, "read_ranges", read_ranges)
    monkeypatch.setattr(verify_shard, "BYTES_AT_ONCE", 1500)
    folder = cache_folder / "code" / "train"
    codes = folder / "codes" / "c" / "0" / "0"
    assert not list(verify(str(cache_folder)))
    assert codes.stat().st_size < largest <= 1500
    assert sum(path.stat().st_size for path in folder.glob("*/c/0/0")) > 2 * 1500
    flip(codes, 8 * (codes.stat().st_size - 80))  # in the last row
    problems = [str(problem) for problem in verify(str(cache_folder))]
    assert problems == ["code/train shard 0: codes is damaged or belongs to another shard"]
