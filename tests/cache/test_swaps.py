"""Whatever is put in another's place, its own checksums being right, is found in reading and by verify."""

import json
import math
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cache_makers import (
    ROWS,
    SHARD_ROWS,
    VOCABULARY_MAP,
    edit,
    make_answers,
    make_manifest,
    make_rows,
    write_domain,
    write_shard,
)
from click.testing import CliRunner
from numcodecs.pcodec import PCodec

import ddk_cache
from ddk_cache import codec, layout, marker_cache, shards
from ddk_cache.cli import info
from ddk_cache.errors import CacheError
from ddk_cache.reader import document_logprobs
from ddk_cache.records import existing_manifest
from ddk_cache.storage import Storage
from ddk_cache.tables import read_codebook
from ddk_cache.verification import verify
from ddk_cache.writer import open_writer


def exchange(one: Path, other: Path) -> None:
    first, second = one.read_bytes(), other.read_bytes()
    one.write_bytes(second)
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
    """Of the same configuration, with the same tables: what differs is the texts that it found."""
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


def the_list_of_the_same_build_of_other_texts(cache: Path, other: Path) -> None:
    same_build_of_other_texts(cache, other)
    shutil.copy(other / layout.seals_key("code", "train"), cache / layout.seals_key("code", "train"))


def a_domain_of_another_domain(cache: Path, other: Path) -> None:
    shutil.rmtree(cache / "code")
    shutil.copytree(cache / "prose", cache / "code")


def a_domain_of_another_cache(cache: Path, other: Path) -> None:
    shutil.rmtree(cache / "code")
    shutil.copytree(other / "code", cache / "code")


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
    *(one_array(name) for name in ("tokens", "label_logprob", "gaps", "codes", "tail", "markers")),
    a_shard_of_another_build,
    a_shard_of_the_same_build_of_other_texts,
    all_shards_of_the_same_build_of_other_texts,
    the_list_of_the_same_build_of_other_texts,
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
    before = {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()}
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
        writer.settle("code")
    assert {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()} == before


def test_no_old_array_stands_under_a_new_marker(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_leftovers_beyond_the_state_bind_nobody(tmp_path: Path) -> None:
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
            places = [problem.place for problem in verify(str(cache_folder))]
        except CacheError as error:
            places = [str(error)]
        assert any(document.partition("/")[0] in place for place in places), bit
    path.write_bytes(whole)
    assert not list(verify(str(cache_folder)))


def test_damaged_documents_are_mended_by_the_next_build(cache_folder: Path) -> None:
    before = {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()}
    for document in ("zarr.json", "ddk.codebook/zarr.json"):
        path = cache_folder / document
        path.write_bytes(path.read_bytes().replace(b'"', b"'", 1))
    shutil.rmtree(cache_folder / "ddk.codebook-0-copy" / "common")
    shutil.copytree(cache_folder / "ddk.codebook" / "common", cache_folder / "ddk.codebook-0-copy" / "common")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP):
        pass
    assert {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()} == before


def test_a_lost_codebook_is_read_from_its_copy(cache_folder: Path) -> None:
    shutil.rmtree(cache_folder / "ddk.codebook")
    read_all(cache_folder)
    assert next(verify(str(cache_folder))).place == "ddk.codebook"


def test_a_reader_holds_few_markers_and_may_be_pickled(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(marker_cache, "MOST_BYTES", 1500)
    cache = ddk_cache.open_cache(str(cache_folder))
    rows = cache["code"].train.read(range(10))
    assert len(cache["code"].train._source.markers._held) < 3
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
        writer.set_codebook(codec.fit(ids, logprobs, writer.manifest.target, writer.manifest.vocab_size))
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
    said = CliRunner().invoke(info, [str(cache_folder), "--documents"], catch_exceptions=False).stdout
    found = [json.loads(line) for line in said.splitlines()]
    split = ddk_cache.open_cache(str(cache_folder))["code"].train
    here = [one for one in found if (one["domain"], one["split"]) == ("code", "train")]
    assert [(one["row"], one["segment"]) for one in here] == [
        (r, s) for r in range(len(split)) for s in (1, 2)
    ]
    row, _, labels, sums = document_logprobs(split.read(range(len(split))))
    for place, one in enumerate(here):
        assert (one["row"], one["labels"]) == (row[place], labels[place])
        assert math.log(one["perplexity"]) == pytest.approx(-sums[place] / labels[place])


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
                w.write_answers("code", split, shard, w.pack(split, {"label_logprob": labels}))
        w.settle("code")
    label = ddk_cache.open_cache(str(tmp_path / "label"))["code"]
    assert label.teacher_cross_entropy == 1.5
    assert label.train.read([0]).ids is None
    assert not list(verify(str(tmp_path / "label")))


def test_a_state_may_not_lie_about_the_cross_entropy(cache_folder: Path) -> None:
    edit(cache_folder / "code" / "zarr.json", lambda state: state.update(teacher_cross_entropy=0.5))
    assert [problem.place for problem in verify(str(cache_folder))] == ["code"]


def test_other_tokens_are_refused_even_where_a_marker_was_lost(cache_folder: Path) -> None:
    """What the state's list tells of a shard outlives the shard."""
    shutil.rmtree(cache_folder / "code" / "train" / "token_markers" / "c" / "0")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        with pytest.raises(CacheError, match="has changed"):
            writer.write_tokens("code", "train", 0, make_rows(SHARD_ROWS, 99))
        rows = {name: part[:SHARD_ROWS] for name, part in make_rows(ROWS["train"], 1).items()}
        writer.write_tokens("code", "train", 0, rows)
        assert writer.unfinished("code", "train") == [0]


def test_tokens_that_another_release_compresses_otherwise_are_the_same(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()}
    original = shards._compressor

    def other(array: layout.RowArray) -> Any:
        return PCodec(equal_pages_up_to=5) if array.compressor == "pcodec" else original(array)

    monkeypatch.setattr(shards, "_compressor", other)
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        rows = {name: part[:SHARD_ROWS] for name, part in make_rows(ROWS["train"], 1).items()}
        packed = shards.pack(rows["tokens"], layout.token_arrays(16)["tokens"], SHARD_ROWS)
        assert packed != before[cache_folder / layout.shard_key("code", "train", "tokens", 0)]
        writer.write_tokens("code", "train", 0, rows)
        assert not writer.unfinished("code", "train")
    assert {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()} == before


def test_a_list_that_was_lost_is_written_again(cache_folder: Path) -> None:
    path = cache_folder / layout.seals_key("code", "train")
    whole = path.read_bytes()
    for damage in (whole[:-1] + bytes([whole[-1] ^ 1]), whole[:32], None):
        path.unlink() if damage is None else path.write_bytes(damage)
        with pytest.raises(CacheError, match="missing or damaged"):
            read_all(cache_folder)
        assert [str(problem) for problem in verify(str(cache_folder))] == [
            "code/train: the list of its shards is missing or damaged; build writes it anew"
        ]
        with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
            writer.settle("code")
        assert path.read_bytes() == whole
        assert not list(verify(str(cache_folder)))


def finish(cache: Path, *names: str) -> None:
    with open_writer(str(cache), make_manifest(*names), VOCABULARY_MAP) as writer:
        writer.finish()


def test_a_whole_domain_of_the_same_build_of_other_texts(cache_folder: Path, tmp_path: Path) -> None:
    """State, lists and all: the manifest tells them apart, once a build has been finished."""
    other = tmp_path / "other"
    same_build_of_other_texts(cache_folder, other)
    for cache in (cache_folder, other):
        read_all(cache)
        finish(cache, "code", "prose")
        assert not list(verify(str(cache)))
    before = {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()}
    shutil.rmtree(cache_folder / "code")
    shutil.copytree(other / "code", cache_folder / "code")
    with pytest.raises(CacheError, match="is another build's"):
        ddk_cache.open_cache(str(cache_folder))
    assert [problem.place for problem in verify(str(cache_folder))] == ["code/zarr.json"]
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        assert writer.state("code") is None
        assert writer.existing_state("prose").complete
        write_domain(writer, "code", 1)
        writer.finish()
    assert {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("key", ["rows", "tokens", "labels"])
def test_a_state_with_other_counts_is_not_the_manifests(cache_folder: Path, key: str) -> None:
    """By the labels a row training shares out its rows, and it reads no more of them than it draws."""
    finish(cache_folder, "code", "prose")
    edit(cache_folder / "code" / "zarr.json", lambda state: state["train"].update({key: 1}))
    with pytest.raises(CacheError, match="is another build's"):
        ddk_cache.open_cache(str(cache_folder))
    assert [problem.place for problem in verify(str(cache_folder))] == ["code/zarr.json"]


def test_the_manifest_tells_nothing_of_a_domain_that_goes_on(cache_folder: Path) -> None:
    """Whenever an extension is killed, what is there can be read, and the next build finishes it."""

    def told() -> list[str | None]:
        return [domain.splits for domain in existing_manifest(Storage(str(cache_folder))).domains]

    def limited(limit: int) -> layout.Manifest:
        domains = [domain.model_dump() for domain in make_manifest("code", "prose").domains]
        return make_manifest(domains=[domains[0] | {"max_tokens": limit}, domains[1]])

    shutil.rmtree(cache_folder)
    with open_writer(str(cache_folder), limited(100), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
        write_domain(writer, "prose", 2)
        assert told() == [None, None]
        writer.finish()
    whole = told()
    assert None not in whole
    with open_writer(str(cache_folder), limited(100), VOCABULARY_MAP):
        assert told() == whole
    with open_writer(str(cache_folder), limited(200), VOCABULARY_MAP) as writer:
        assert told() == [None, whole[1]]
        read_all(cache_folder)
        state = writer.existing_state("code")
        parts = make_rows(ROWS["train"], 1), make_rows(2, 3)
        rows = {name: np.concatenate([part[name] for part in parts])[-SHARD_ROWS:] for name in parts[0]}
        writer.write_tokens("code", "train", 2, rows)
        more = {"rows": 12, "tokens": state.train.tokens + 24, "labels": state.train.labels + 18}
        grown = state.train.model_copy(update=more | {"token_seals": None})
        writer.set_state("code", state.model_copy(update={"train": grown, "complete": False}))
        ddk_cache.open_cache(str(cache_folder), allow_incomplete=True)
        writer.finish()
        assert told() == [None, whole[1]]


def test_a_list_lost_beside_a_foreign_shard_is_told_as_what_it_may_be(
    cache_folder: Path, tmp_path: Path
) -> None:
    a_shard_of_the_same_build_of_other_texts(cache_folder, tmp_path / "other")
    (cache_folder / layout.seals_key("code", "train")).unlink()
    said = "has changed since the cache was built, or they are of another build: .*, or remove code there"
    rows = {name: part[SHARD_ROWS : 2 * SHARD_ROWS] for name, part in make_rows(ROWS["train"], 1).items()}
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        with pytest.raises(CacheError, match=said):
            writer.settle("code")
        with pytest.raises(CacheError, match=said):
            writer.write_tokens("code", "train", 1, rows)
    shutil.rmtree(cache_folder / "code")
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    assert not list(verify(str(cache_folder)))


def test_a_cache_from_before_the_lists_gets_them_with_the_next_build(cache_folder: Path) -> None:
    before = {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()}
    for domain in ("code", "prose"):
        for split in layout.SPLITS:
            shutil.rmtree(cache_folder / domain / split / layout.TOKEN_SEALS)
        edit(
            cache_folder / domain / "zarr.json",
            lambda state: [state[split].pop("token_seals") for split in layout.SPLITS],
        )
    read_all(cache_folder)
    assert not list(verify(str(cache_folder)))
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        for domain in ("code", "prose"):
            writer.settle(domain)
    assert {path: path.read_bytes() for path in cache_folder.rglob("*") if path.is_file()} == before
