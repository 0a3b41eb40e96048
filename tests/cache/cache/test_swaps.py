"""Swapped, stale and foreign parts are refused, however right their own checksums are."""

import json
import math
import pickle
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from helpers.caches import (
    ROWS,
    SHARD_ROWS,
    VOCABULARY_MAP,
    make_answers,
    make_manifest,
    make_rows,
    read_files,
    write_domain,
    write_shard,
)
from numcodecs.pcodec import PCodec

import ddk_cache
from ddk_cache.cache import commits
from ddk_cache.cache.codebooks import read_codebook
from ddk_cache.cache.metadata import existing_manifest
from ddk_cache.cache.rows import document_logprobs
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import open_writer
from ddk_cache.cli.commands import info
from ddk_cache.errors import CacheError
from ddk_cache.format import layout, shards
from ddk_cache.format.codebook import fit_codebook
from ddk_cache.storage.storage import Storage


def exchange(path: Path, other: Path) -> None:
    first, second = path.read_bytes(), other.read_bytes()
    path.write_bytes(second)
    other.write_bytes(first)


def whole_shards(cache: Path, other: Path) -> None:
    for array in (cache / "code" / "train").iterdir():
        if (array / "c" / "1").is_dir():
            exchange(array / "c" / "0" / "0", array / "c" / "1" / "0")


def one_array(name: str) -> Callable[[Path, Path], None]:
    def swap(cache: Path, other: Path) -> None:
        folder = cache / "code" / "train" / name / "c"
        exchange(folder / "0" / "0", folder / "1" / "0")

    return swap


def a_shard_of_another_build(cache: Path, other: Path) -> None:
    for array in (cache / "code" / "train").iterdir():
        if (array / "c" / "1").is_dir():
            shutil.copy(other / "code" / "train" / array.name / "c" / "1" / "0", array / "c" / "1" / "0")


def same_build_of_other_texts(cache: Path, other: Path) -> None:
    """Of the same configuration, with the same codebook, from other texts."""
    shutil.rmtree(other, ignore_errors=True)
    manifest = make_manifest("code", "prose")
    with open_writer(str(other), manifest, VOCABULARY_MAP) as writer:
        codebook = read_codebook(Storage(str(cache)))
        assert codebook is not None
        writer.set_codebook(codebook)
        write_domain(writer, "code", 11)
        write_domain(writer, "prose", 2)


def a_shard_of_the_same_build_of_other_texts(cache: Path, other: Path) -> None:
    same_build_of_other_texts(cache, other)
    a_shard_of_another_build(cache, other)


def all_shards_of_the_same_build_of_other_texts(cache: Path, other: Path) -> None:
    same_build_of_other_texts(cache, other)
    shutil.rmtree(cache / "code" / "train")
    shutil.copytree(other / "code" / "train", cache / "code" / "train")


def replace_domain(cache: Path, source: Path) -> None:
    """Replace a domain, its state included."""
    shutil.rmtree(cache / "code")
    shutil.copytree(source, cache / "code")


def a_domain_of_the_same_build_of_other_texts(cache: Path, other: Path) -> None:
    same_build_of_other_texts(cache, other)
    replace_domain(cache, other / "code")


def a_state_of_the_same_build_of_other_texts(cache: Path, other: Path) -> None:
    same_build_of_other_texts(cache, other)
    shutil.copy(other / "code" / "zarr.json", cache / "code" / "zarr.json")


def a_domain_of_another_domain(cache: Path, other: Path) -> None:
    replace_domain(cache, cache / "prose")


def a_domain_of_another_cache(cache: Path, other: Path) -> None:
    replace_domain(cache, other / "code")


def a_state_of_another_domain(cache: Path, other: Path) -> None:
    shutil.copy(cache / "prose" / "zarr.json", cache / "code" / "zarr.json")


def both_codebooks_of_another_build(cache: Path, other: Path) -> None:
    for group in ("ddk.codebook", "ddk.codebook-0-copy"):
        document = cache / group / "common" / "c" / "0" / "0"
        data = document.read_bytes()
        shutil.rmtree(cache / group)
        shutil.copytree(other / group, cache / group)
        assert document.read_bytes() != data


def the_manifest_of_another_cache(cache: Path, other: Path) -> None:
    shutil.copy(other / "zarr.json", cache / "zarr.json")


SWAPS = [
    whole_shards,
    *(one_array(name) for name in ("tokens", "label_logprob", "gaps", "codes", "tail", "commits")),
    a_shard_of_another_build,
    a_shard_of_the_same_build_of_other_texts,
    all_shards_of_the_same_build_of_other_texts,
    a_domain_of_the_same_build_of_other_texts,
    a_state_of_the_same_build_of_other_texts,
    a_domain_of_another_domain,
    a_domain_of_another_cache,
    a_state_of_another_domain,
    both_codebooks_of_another_build,
    the_manifest_of_another_cache,
]


def read_all(cache: Path) -> None:
    for domain in ddk_cache.open_cache(str(cache)).values():
        for split in (domain.train, domain.validation):
            split.read(range(len(split)))


@pytest.mark.parametrize("swap", SWAPS)
def test_a_swap_is_found(cache_folder: Path, tmp_path: Path, swap: Callable[[Path, Path], None]) -> None:
    other = tmp_path / "other"
    target = {"top_k": 5}
    with open_writer(str(other), make_manifest("code", "prose", seed=5, target=target), VOCABULARY_MAP) as w:
        write_domain(w, "code", 11)
        write_domain(w, "prose", 12)
    if swap is both_codebooks_of_another_build:
        shutil.rmtree(other)
        with open_writer(str(other), make_manifest("code", target={"top_k": 3}), VOCABULARY_MAP) as w:
            write_domain(w, "code", 13)
    swap(cache_folder, other)
    with pytest.raises(CacheError):
        read_all(cache_folder)
    assert list(verify(str(cache_folder)))


def test_verify_and_build_launder_nothing(cache_folder: Path) -> None:
    """What verify found is asked for again, to the bytes that were meant."""
    before = read_files(cache_folder)
    for name in ("codes", "label_logprob"):
        one_array(name)(cache_folder, cache_folder)
    problems = [str(problem) for problem in verify(str(cache_folder))]
    assert [problem.partition(":")[0] for problem in problems] == ["code/train shard 0", "code/train shard 1"]
    assert not ddk_cache.open_cache(str(cache_folder), allow_incomplete=True)["code"].complete
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == [0, 1]
        assert writer.has_tokens("code")
        answers = make_answers(make_rows(ROWS["train"], 1)["loss_mask"], writer.manifest.target, 1)
        for shard in (0, 1):
            write_shard(writer, "code", "train", shard, answers)
        writer.finalize_domain("code")
    assert read_files(cache_folder) == before


def test_no_record_covers_old_and_new_arrays(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build killed while it writes a shard again leaves one that is not finished."""
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        answers = make_answers(make_rows(ROWS["train"], 7)["loss_mask"], writer.manifest.target, 7)
        written = 0
        original = type(writer._storage).write

        def write(self: object, key: str, data: bytes) -> None:
            nonlocal written
            written += 1
            if written > 2:
                raise KeyboardInterrupt
            original(self, key, data)  # type: ignore[arg-type]

        monkeypatch.setattr(type(writer._storage), "write", write)
        with pytest.raises(KeyboardInterrupt):
            write_shard(writer, "code", "train", 0, answers)
        monkeypatch.undo()
        assert writer.unfinished("code", "train") == [0]


def test_shards_beyond_the_state_may_be_replaced(tmp_path: Path) -> None:
    """A large build killed in tokenising, then a small one, then the large one again, of another source."""
    with open_writer(str(tmp_path / "cache"), make_manifest("code"), VOCABULARY_MAP) as writer:
        for shard in range(5):
            writer.write_tokens("code", "train", shard, make_rows(SHARD_ROWS, 50 + shard))
        write_domain(writer, "code", 1)
        state = writer.state("code")
        assert state is not None
        for shard in (3, 4):
            writer.write_tokens("code", "train", shard, make_rows(SHARD_ROWS, 80 + shard))
        with pytest.raises(CacheError, match="has changed"):
            writer.write_tokens("code", "train", 0, make_rows(SHARD_ROWS, 99))


def test_a_damaged_last_shard_and_an_extension_in_one_go(cache_folder: Path) -> None:
    path = cache_folder / "code" / "train" / "tokens" / "c" / "2" / "0"
    data = bytearray(path.read_bytes())
    data[3] ^= 1
    path.write_bytes(bytes(data))
    rows = {
        name: np.concatenate([make_rows(10, 1)[name], make_rows(12, 9)[name][10:]])
        for name in make_rows(1, 1)
    }
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        writer.write_tokens("code", "train", 2, {name: part[8:] for name, part in rows.items()})
        state = writer.state("code")
        assert state is not None
        grown = state.train.model_copy(update={"rows": 12})
        writer.set_state("code", state.model_copy(update={"complete": False, "train": grown}))
        assert writer.unfinished("code", "train") == [2]
        tokens = writer.read_tokens("code", "train", 2)
        np.testing.assert_array_equal(tokens["tokens"], rows["tokens"][8:])


@pytest.mark.parametrize("document", ["zarr.json", "code/zarr.json", "ddk.codebook/zarr.json"])
def test_no_bit_of_a_document_passes_unnoticed(cache_folder: Path, document: str) -> None:
    path = cache_folder / document
    whole = path.read_bytes()
    for bit in range(0, 8 * len(whole), 41):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(bytes(data))
        try:
            locations = [problem.location for problem in verify(str(cache_folder))]
        except CacheError as error:
            locations = [str(error)]
        assert any(document.partition("/")[0] in location for location in locations), bit
    path.write_bytes(whole)
    assert not list(verify(str(cache_folder)))


def test_damaged_documents_are_mended_by_the_next_build(cache_folder: Path) -> None:
    before = read_files(cache_folder)
    for document in ("zarr.json", "ddk.codebook/zarr.json"):
        path = cache_folder / document
        path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))
    shutil.rmtree(cache_folder / "ddk.codebook-0-copy" / "common")
    shutil.copytree(cache_folder / "ddk.codebook" / "common", cache_folder / "ddk.codebook-0-copy" / "common")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP):
        pass
    assert read_files(cache_folder) == before


def test_a_lost_codebook_is_read_from_its_copy(cache_folder: Path) -> None:
    shutil.rmtree(cache_folder / "ddk.codebook")
    read_all(cache_folder)
    assert next(verify(str(cache_folder))).location == "ddk.codebook"


def test_a_reader_keeps_few_records_and_may_be_pickled(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record may have 64 MiB, and a row of each of many shards may be asked for."""
    monkeypatch.setattr(commits, "MOST_BYTES", 1500)
    monkeypatch.setattr(commits, "BYTES_AT_ONCE", 1500)
    cache = ddk_cache.open_cache(str(cache_folder))
    original, at_once = Storage.read_all, []

    def read_all(self: Storage, limits: Mapping[str, int]) -> list[bytes | None]:
        at_once.append(len(limits))
        return original(self, limits)

    monkeypatch.setattr(Storage, "read_all", read_all)
    rows = cache["code"].train.read(range(10))
    assert at_once == [2, 1]
    assert len(cache["code"].train._source.commits._records) < 3
    copy = pickle.loads(pickle.dumps(cache))
    np.testing.assert_array_equal(copy["code"].train.read([9, 0]).ids, rows.ids[[9, 0]])  # type: ignore[index]


def test_labels_are_not_read_where_they_are_not_asked_for(cache_folder: Path) -> None:
    shutil.rmtree(cache_folder / "code" / "train" / "label_logprob" / "c")
    split = ddk_cache.open_cache(str(cache_folder))["code"].train
    assert split.read([1], labels=False).label_logprob is None
    with pytest.raises(CacheError):
        split.read([1])


def test_what_lost_tables_coded_is_done_again(cache_folder: Path) -> None:
    """A build that has made others is killed; the next one keeps nothing of the old."""
    for group in ("ddk.codebook", "ddk.codebook-0-copy"):
        shutil.rmtree(cache_folder / group)
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == [0, 1, 2]
        other = make_answers(np.ones((2, 16), bool), writer.manifest.target, 5)
        ids, logprobs = other["ids"].reshape(-1, 5), other["logprobs"].reshape(-1, 5)
        writer.set_codebook(fit_codebook(ids, logprobs, writer.manifest.target, writer.manifest.vocab_size))
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        for domain in ("code", "prose"):
            assert writer.unfinished(domain, "train") == [0, 1, 2]
            assert writer.unfinished(domain, "validation") == []


def test_documents_have_their_own_sums(cache_folder: Path) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read([4, 2])
    row, segment, labels, sums = document_logprobs(rows)
    assert list(zip(row.tolist(), segment.tolist(), strict=True)) == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert labels.tolist() == [7, 3, 7, 3]
    assert rows.label_logprob is not None
    assert sums.sum() == pytest.approx(float(rows.label_logprob.sum(dtype=np.float64)))
    assert sums[3] == pytest.approx(float(rows.label_logprob[1, 8:11].sum(dtype=np.float64)))


def test_each_documents_perplexity_is_told(cache_folder: Path) -> None:
    output = CliRunner().invoke(info, [str(cache_folder), "--documents"], catch_exceptions=False).stdout
    documents = [json.loads(line) for line in output.splitlines()]
    split = ddk_cache.open_cache(str(cache_folder))["code"].train
    train = [
        document for document in documents if (document["domain"], document["split"]) == ("code", "train")
    ]
    assert [(document["row"], document["segment"]) for document in train] == [
        (r, s) for r in range(len(split)) for s in (1, 2)
    ]
    row, _, labels, sums = document_logprobs(split.read(range(len(split))))
    for index, document in enumerate(train):
        assert (document["row"], document["labels"]) == (row[index], labels[index])
        assert math.log(document["perplexity"]) == pytest.approx(-sums[index] / labels[index])


def test_a_validation_split_may_keep_targets_and_a_label_cache_has_none(tmp_path: Path) -> None:
    manifest = make_manifest("code", validation_targets=True)
    with open_writer(str(tmp_path / "both"), manifest, VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    cache = ddk_cache.open_cache(str(tmp_path / "both"))
    assert cache["code"].validation.read([0]).ids is not None
    assert not list(verify(str(tmp_path / "both")))
    with open_writer(
        str(tmp_path / "label"), make_manifest("code", target={"kind": "label"}), VOCABULARY_MAP
    ) as w:
        write_domain(w, "code", 1, answers=False)
        for split in layout.SPLITS:
            for shard in w.unfinished("code", split):
                tokens = w.read_tokens("code", split, shard)
                labels = np.where(tokens["loss_mask"], np.float32(-1.5), np.float32(0))
                w.write_answers("code", split, shard, w.encode_rows(split, {"label_logprob": labels}))
        w.finalize_domain("code")
    label = ddk_cache.open_cache(str(tmp_path / "label"))["code"]
    assert label.teacher_cross_entropy == 1.5
    assert label.train.read([0]).ids is None
    assert not list(verify(str(tmp_path / "label")))


def test_a_shard_whose_record_was_lost_is_written_again(cache_folder: Path) -> None:
    shutil.rmtree(cache_folder / "code" / "train" / "token_commits" / "c" / "0")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert not writer.has_tokens("code")
        rows = {name: part[:SHARD_ROWS] for name, part in make_rows(ROWS["train"], 1).items()}
        writer.write_tokens("code", "train", 0, rows)
        assert writer.unfinished("code", "train") == [0]


def test_tokens_that_another_release_compresses_otherwise_are_the_same(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = read_files(cache_folder)
    original = shards._compressor

    def other(array: layout.RowArray) -> Any:
        return PCodec(equal_pages_up_to=5) if array.compressor == "pcodec" else original(array)

    monkeypatch.setattr(shards, "_compressor", other)
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        rows = {name: part[:SHARD_ROWS] for name, part in make_rows(ROWS["train"], 1).items()}
        packed = shards.encode(rows["tokens"], layout.token_arrays(16)["tokens"], SHARD_ROWS)
        assert packed != before[cache_folder / layout.ShardKey("code", "train", 0).object("tokens")]
        writer.write_tokens("code", "train", 0, rows)
        assert not writer.unfinished("code", "train")
    assert read_files(cache_folder) == before


def build_ids(cache: Path) -> dict[str, str]:
    return {d.name: d.build_id for d in existing_manifest(Storage(str(cache))).domains}


def test_a_build_tokenises_a_foreign_domain_again(cache_folder: Path, tmp_path: Path) -> None:
    """State, shards and all; nothing of the other build is kept."""
    before = read_files(cache_folder)
    a_domain_of_the_same_build_of_other_texts(cache_folder, tmp_path / "other")
    with pytest.raises(CacheError, match="belongs to another domain, cache or build"):
        ddk_cache.open_cache(str(cache_folder))
    assert [problem.location for problem in verify(str(cache_folder))] == ["code/zarr.json"]
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.state("code") is None
        assert writer.existing_state("prose").complete
        write_domain(writer, "code", 1)
    assert read_files(cache_folder) == before


def test_verify_then_build_launders_no_foreign_shard(cache_folder: Path, tmp_path: Path) -> None:
    before = read_files(cache_folder)
    all_shards_of_the_same_build_of_other_texts(cache_folder, tmp_path / "other")
    assert {p.location for p in verify(str(cache_folder))} == {f"code/train shard {n}" for n in range(3)}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == [0, 1, 2]
        assert not writer.has_tokens("code")
        write_domain(writer, "code", 1)
    assert read_files(cache_folder) == before


def test_a_build_id_is_kept_until_a_domain_begins_again(cache_folder: Path, tmp_path: Path) -> None:
    before = build_ids(cache_folder)
    domains = [domain.model_dump(exclude={"build_id"}) for domain in make_manifest("code", "prose").domains]
    more = make_manifest(domains=[*domains, domains[0] | {"name": "extra"}])
    with open_writer(str(cache_folder), more, VOCABULARY_MAP):
        after = build_ids(cache_folder)
        assert {name: after.pop(name) for name in before} == before
        assert set(after) == {"extra"}
    same_build_of_other_texts(cache_folder, tmp_path / "other")
    assert not set(build_ids(tmp_path / "other").values()) & set(before.values())
    (cache_folder / "zarr.json").write_bytes(b"damaged")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP):
        assert build_ids(cache_folder) == before
    shutil.rmtree(cache_folder / "code")  # as an error advises where a source has changed
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP):
        assert build_ids(cache_folder)["code"] != before["code"]
        assert build_ids(cache_folder)["prose"] == before["prose"]
