"""Write a cache, read it back: through the reader and through plain zarr."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers.caches import (
    ROWS,
    SEQ_LENGTH,
    SHARD_ROWS,
    VOCABULARY_MAP,
    make_answers,
    make_manifest,
    make_rows,
    write_domain,
    write_shard,
    zarr_array,
)

import ddk_cache
from ddk_cache.cache.verify import verify
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.errors import CacheError, CacheNotFoundError, ConfigError, IncompleteCacheError
from ddk_cache.format import layout, shards
from ddk_cache.storage.storage import Storage


def test_rows_come_back_in_any_order(tmp_path: Path) -> None:
    with open_writer(str(tmp_path / "cache"), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        originals = {name: write_domain(writer, name, seed) for seed, name in enumerate(["code", "prose"])}
    cache = ddk_cache.open_cache(str(tmp_path / "cache"))
    assert cache.domains == ("code", "prose")
    assert cache.target.top_k == 5
    indices = [7, 0, 9, 7]
    for name, original in originals.items():
        assert len(cache[name].train) == ROWS["train"]
        rows = cache[name].train.read(indices)
        for array in ("tokens", "segments", "loss_mask", "label_logprob"):
            values = getattr(rows, array)
            assert values.dtype == original[array].dtype
            np.testing.assert_array_equal(values, original[array][indices])
        assert rows.ids is not None
        assert rows.logprobs is not None
        assert rows.tail_logprob is not None
        order, expected = np.argsort(rows.ids, -1), np.argsort(original["ids"][indices], -1)
        np.testing.assert_array_equal(
            np.take_along_axis(rows.ids, order, -1),
            np.take_along_axis(original["ids"][indices], expected, -1),
        )
        np.testing.assert_allclose(
            np.take_along_axis(rows.logprobs, order, -1),
            np.take_along_axis(original["logprobs"][indices], expected, -1),
            atol=0.02,  # what the grid may move an entry by, see codec.py
        )
        mass = np.exp(rows.logprobs).sum(-1) + np.exp(rows.tail_logprob)
        np.testing.assert_allclose(mass[rows.loss_mask], 1, atol=1e-3)


def test_validation_has_labels_but_no_entries(cache_folder: Path) -> None:
    domain = ddk_cache.open_cache(str(cache_folder))["prose"]
    rows = domain.validation.read(range(3))
    assert rows.ids is None
    assert rows.logprobs is None
    assert rows.label_logprob is not None
    expected = -rows.label_logprob[rows.loss_mask].astype(np.float64).mean()
    assert domain.teacher_cross_entropy == pytest.approx(expected, abs=1e-12)


def test_without_targets_their_bytes_are_not_touched(cache_folder: Path) -> None:
    for array in ("ids", "tail_logprob", "logprobs", "gaps", "levels"):
        shutil.rmtree(cache_folder / "code" / "train" / array, ignore_errors=True)
    split = ddk_cache.open_cache(str(cache_folder))["code"].train
    assert split.read([3], targets=False).ids is None
    with pytest.raises(CacheError, match="is missing"):
        split.read([3])


def test_every_array_opens_in_plain_zarr(cache_folder: Path) -> None:
    cache = ddk_cache.open_cache(str(cache_folder))
    rows = cache["code"].train.read(range(ROWS["train"]))
    for name in ("tokens", "segments", "label_logprob"):
        np.testing.assert_array_equal(zarr_array(cache, f"code/train/{name}")[:], getattr(rows, name))
    split = cache.as_zarr()["code/train"]
    assert isinstance(split, zarr.Group)
    arrays: dict[str, Any] = dict(split.arrays())
    commits, token_commits = arrays.pop("commits"), arrays.pop("token_commits")
    assert commits.shape == (3, 8 + len(arrays) * (40 + 8 * SHARD_ROWS) + 32)
    assert token_commits.shape == (3, 8 + 3 * (40 + 8 * SHARD_ROWS) + 32)
    for array in (commits, token_commits):  # the number of rows comes first
        assert array[:, :8].copy().view("<u8").ravel().tolist() == [4, 4, 2]
    assert set(commits.attrs["arrays"]) == set(arrays)
    assert token_commits.attrs["arrays"] == ["tokens", "segments", "loss_mask"]


def test_a_split_that_fits_into_one_shard_has_no_room_for_more(cache_folder: Path) -> None:
    """Three validation rows, in shards of four."""
    cache = ddk_cache.open_cache(str(cache_folder))
    assert zarr_array(cache, "code/validation/tokens").shards == (3, SEQ_LENGTH)
    assert zarr_array(cache, "code/validation/commits").shape == (1, 8 + 4 * (40 + 8 * 3) + 32)
    index = 16 * 3 + 4
    for name in ("tokens", "label_logprob"):
        data = (cache_folder / layout.ShardKey("code", "validation", 0).object(name)).read_bytes()
        assert len(shards.chunk_lengths(data, 3)) == 3
        assert int.from_bytes(data[-index:][:8], "little") == 0  # the first chunk's offset


@pytest.mark.parametrize("rows", [[-1], [10], [[1]]])
def test_rows_that_are_not_there_are_refused(cache_folder: Path, rows: list[int]) -> None:
    with pytest.raises((IndexError, ValueError), match="rows"):
        ddk_cache.open_cache(str(cache_folder))["code"].train.read(rows)


def test_opening_costs_the_same_however_many_rows_there_are(
    cache_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    original = Storage.read

    def counted(self: Storage, key: str, *most: int) -> bytes | None:
        read.append(key)
        return original(self, key, *most)

    monkeypatch.setattr(Storage, "read", counted)
    ddk_cache.open_cache(str(cache_folder))
    assert sum(key.endswith("/zarr.json") for key in read) == 2 + 1, "domains and codebook"
    expected_keys = ("zarr.json", "/commits/", "codebook/")
    assert all(any(part in key for part in expected_keys) for key in read)
    assert sorted(key for key in read if "/commits/" in key) == sorted(
        layout.ShardKey(name, split, last).object("commits")
        for name in ("code", "prose")
        for split, last in zip(layout.SPLITS, (2, 0), strict=True)
    )


def test_an_unfinished_cache_is_refused_or_read_in_part(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    with open_writer(url, make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
        write_domain(writer, "prose", 2, answers=False)
        answers = make_answers(make_rows(ROWS["train"], 2)["loss_mask"], writer.manifest.target, 2)
        write_shard(writer, "prose", "train", 1, answers)
        assert writer.unfinished("prose", "train") == [0, 2]
    with pytest.raises(IncompleteCacheError, match="prose"):
        ddk_cache.open_cache(url)
    domain = ddk_cache.open_cache(url, allow_incomplete=True)["prose"]
    assert len(domain.train) == SHARD_ROWS
    np.testing.assert_array_equal(domain.train.read([2]).label_logprob, answers["label_logprob"][[6]])
    with pytest.raises(CacheError, match="validation"):
        _ = domain.teacher_cross_entropy


def test_a_shard_that_has_grown_is_done_again(cache_folder: Path) -> None:
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        state = writer.state("code")
        assert state is not None
        rows = make_rows(12, 1)
        rows = {name: np.concatenate([make_rows(10, 1)[name], rows[name][10:]]) for name in rows}
        writer.write_tokens("code", "train", 2, {name: values[8:] for name, values in rows.items()})
        grown = state.model_copy(
            update={"complete": False, "train": state.train.model_copy(update={"rows": 12})}
        )
        writer.set_state("code", grown)
        assert writer.unfinished("code", "train") == [2]
        tokens = writer.read_tokens("code", "train", 2)
        np.testing.assert_array_equal(tokens["tokens"], rows["tokens"][8:])


@pytest.mark.parametrize("rows", [3, 4, 6])
def test_a_split_of_one_shard_may_grow(tmp_path: Path, rows: int) -> None:
    """Within its shard of four rows, or beyond it; what was read before is read again."""
    url = str(tmp_path / "cache")

    def write(writer: Writer, count: int) -> None:
        tokens = make_rows(6, 1)
        for shard, start in enumerate(range(0, count, SHARD_ROWS)):
            part = {name: values[start:count][:SHARD_ROWS] for name, values in tokens.items()}
            writer.write_tokens("code", "train", shard, part)
        state = writer.existing_state("code")
        counts = {"rows": count, "tokens": 12 * count, "labels": 10 * count}
        train = layout.SplitState.model_validate(counts)
        writer.set_state("code", state.model_copy(update={"train": train, "complete": False}))
        answers = make_answers(tokens["loss_mask"], writer.manifest.target, 1)
        for shard in writer.unfinished("code", "train"):
            part = {name: values[:count] for name, values in answers.items()}
            write_shard(writer, "code", "train", shard, part)
        assert writer.finalize_domain("code").complete

    with open_writer(url, make_manifest("code"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    shutil.rmtree(tmp_path / "cache" / "code" / "train")
    with open_writer(url, make_manifest("code"), VOCABULARY_MAP) as writer:
        write(writer, 2)
    before = ddk_cache.open_cache(url)["code"].train.read([0, 1])
    with open_writer(url, make_manifest("code"), VOCABULARY_MAP) as writer:
        write(writer, rows)
    assert not list(verify(url))
    cache = ddk_cache.open_cache(url)
    assert zarr_array(cache, "code/train/tokens").shards == (min(rows, SHARD_ROWS), SEQ_LENGTH)
    after = cache["code"].train.read(range(rows))
    for name, values in before.arrays().items():
        np.testing.assert_array_equal(after.arrays()[name][:2], values)


def test_a_source_that_changed_is_refused(cache_folder: Path) -> None:
    with open_writer(str(cache_folder), make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        rows = {name: values[:4] for name, values in make_rows(10, 1).items()}
        writer.write_tokens("code", "train", 0, rows)
        assert writer.unfinished("code", "train") == []
        rows["tokens"] = rows["tokens"] + 1
        with pytest.raises(CacheError, match="source of domain 'code' has changed"):
            writer.write_tokens("code", "train", 0, rows)


def test_a_different_configuration_is_refused_with_every_difference(cache_folder: Path) -> None:
    manifest = make_manifest("code", "prose", seed=1, seq_length=32)
    with (
        pytest.raises(ConfigError, match=r"seq_length: 16 -> 32; seed: 0 -> 1"),
        open_writer(str(cache_folder), manifest, VOCABULARY_MAP),
    ):
        pass


def test_a_domain_may_be_added(cache_folder: Path) -> None:
    with open_writer(str(cache_folder), make_manifest("code", "prose", "extra"), VOCABULARY_MAP) as writer:
        assert writer.unfinished("code", "train") == []
        assert writer.state("extra") is None
        write_domain(writer, "extra", 3)
    assert ddk_cache.open_cache(str(cache_folder)).domains == ("code", "prose", "extra")


def test_a_folder_with_other_files_stays_unchanged(tmp_path: Path) -> None:
    manifest = make_manifest("code", "prose")
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "model.safetensors").write_bytes(b"weights")
    with (
        pytest.raises(
            ConfigError, match=r"^cache: .*theirs is not a cache but holds other files, such as model\.saf"
        ),
        open_writer(str(theirs), manifest, VOCABULARY_MAP),
    ):
        pass
    assert [path.name for path in theirs.iterdir()] == ["model.safetensors"]
    # A repository with a card, which becomes a cache.
    mine = tmp_path / "mine"
    (mine / ".git").mkdir(parents=True)
    (mine / "README.md").write_text("# mine")
    with open_writer(str(mine), manifest, VOCABULARY_MAP):
        pass
    assert (mine / "README.md").read_text() == "# mine"


def test_no_cache_there(tmp_path: Path) -> None:
    with pytest.raises(CacheNotFoundError):
        ddk_cache.open_cache(str(tmp_path / "nothing"))
    for address in ("ftp://there", "s3:/bucket/cache"):
        with pytest.raises(CacheNotFoundError, match="a cache is a folder or begins with"):
            ddk_cache.open_cache(address)
    with pytest.raises(CacheNotFoundError):
        ddk_cache.open_cache(str(tmp_path))
