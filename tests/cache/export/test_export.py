"""Exports follow the rules of the trainers that read them; the rows would reveal a shift by one."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.caches import ROWS, SEQ_LENGTH, SHARD_ROWS, VOCABULARY_MAP, edit, make_manifest, write_domain
from numpy.testing import assert_array_equal

from ddk_cache import open_cache
from ddk_cache.cache.reader import Cache
from ddk_cache.cache.rows import Rows
from ddk_cache.cache.writer import open_writer
from ddk_cache.cli.commands import export
from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.export import formats as export_formats
from ddk_cache.export.writer import FORMATS, Export
from ddk_cache.format import layout

NONE = [-1, -1]
# Three documents and padding. The teacher's best entry is the true next token: position t shows token
# t + 1. In the second document only the token 9 carries loss; the last has one token and no target.
HAND_MADE = Rows.from_arrays(
    {
        "tokens": np.array([[5, 6, 7, 8, 1, 9, 3, 0]], np.int32),
        "segments": np.array([[1, 1, 1, 2, 2, 2, 3, 0]], np.uint16),
        "loss_mask": np.array([[1, 1, 0, 0, 1, 0, 0, 0]], bool),
        "label_logprob": np.log(np.array([[0.6, 0.9, 1, 1, 0.7, 1, 1, 1]], np.float32)),
        "ids": np.array([[[6, 0], [7, -1], NONE, NONE, [9, 2], NONE, NONE, NONE]], np.int32),
        "logprobs": np.log(
            np.array(
                [[[0.6, 0.3], [0.9, 0], [0, 0], [0, 0], [0.7, 0.2], [0, 0], [0, 0], [0, 0]]], np.float32
            ),
            out=np.full((1, 8, 2), -np.inf, np.float32),
            where=np.array([[[1, 1], [1, 0], [0, 0], [0, 0], [1, 1], [0, 0], [0, 0], [0, 0]]], bool),
        ),
        "tail_logprob": np.log(np.array([[0.1, 0.1, 1, 1, 0.1, 1, 1, 1]], np.float32)),
    }
)
NO = float(np.float32(export_formats.ABSENT))


def test_axolotl_by_hand() -> None:
    first, second = export_formats.axolotl(HAND_MADE).to_pylist()
    assert first["input_ids"] == [5, 6, 7]
    assert first["attention_mask"] == [1, 1, 1]
    assert first["labels"] == [-100, 6, 7]
    assert first["target_token_ids"] == [[6, 0], [7, 0], [0, 1]]
    assert first["target_mask"] == [[1, 1], [1, 0], [0, 0]]
    assert np.allclose(np.exp(first["target_logprobs"]), np.array([[0.6, 0.3], [0.9, 0], [0, 0]]))
    assert second["input_ids"] == [8, 1, 9]
    assert second["labels"] == [-100, -100, 9]
    assert second["target_mask"] == [[0, 0], [1, 1], [0, 0]]
    assert second["target_token_ids"][1] == [9, 2]


def test_axolotl_masks_follow_the_labels() -> None:
    """Its own rule: target_mask[t] is on where labels[t + 1] is a label."""
    for row in export_formats.axolotl(HAND_MADE).to_pylist():
        is_label = [label != -100 for label in row["labels"]]
        assert [any(mask) for mask in row["target_mask"]] == [*is_label[1:], False]
        for t, mask in enumerate(row["target_mask"]):
            if any(mask):
                assert row["target_token_ids"][t][0] == row["labels"][t + 1] == row["input_ids"][t + 1]


def test_distillkit_by_hand() -> None:
    first, second = export_formats.distillkit(HAND_MADE).to_pylist()
    assert first["input_ids"] == [5, 6, 7, 0, 0, 0, 0, 0]
    assert first["attention_mask"] == [1, 1, 1, 0, 0, 0, 0, 0]
    assert first["labels"] == [5, 6, -100, -100, -100, -100, -100, -100]
    assert first["token_ids"] == [[6, 0], [7, 0]] + [[0, 1]] * 6
    assert np.allclose(np.exp(first["top_values"]), [[0.6, 0.3], [0.9, 0]] + [[0, 0]] * 6)
    assert second["labels"] == [-100, 1, -100, -100, -100, -100, -100, -100]


def kept_kl(logits: np.ndarray, ids: np.ndarray, logprobs: np.ndarray, counts: np.ndarray) -> float:
    """Return the mean KL of the stored entries, each position against the logits of the same position."""
    student = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    student = np.take_along_axis(student, ids, axis=-1)
    return float((np.exp(logprobs) * (logprobs - student)).sum(-1)[counts].mean())


def teacher_logits(row: Rows) -> np.ndarray:
    """Return the logits [S, V] of a model that predicts what the cache holds; the tail goes to one id."""
    assert row.ids is not None
    assert row.logprobs is not None
    logits = np.full((row.ids.shape[1], 12), -30.0)
    for position, (ids, values) in enumerate(zip(row.ids[0], row.logprobs[0], strict=True)):
        logits[position, ids[ids >= 0]] = values[ids >= 0]
        logits[position, 11] = np.log(max(1 - np.exp(values[ids >= 0]).sum(), 1e-13))
    return logits


@pytest.mark.parametrize("shift", [0, 1, -1])
def test_a_shift_by_one_would_show(shift: int) -> None:
    """A student equal to the teacher has KL 0 by both trainers' rules; one position off it is large."""
    logits = np.roll(teacher_logits(HAND_MADE), shift, axis=0)
    kl = []
    for row, start in zip(export_formats.axolotl(HAND_MADE).to_pylist(), (0, 3), strict=True):
        counts = np.array(row["target_mask"]).max(-1) > 0
        ids, values = np.array(row["target_token_ids"]), np.array(row["target_logprobs"])
        kl.append(kept_kl(logits[start : start + len(ids)], ids, values, counts))
    for row, start in zip(export_formats.distillkit(HAND_MADE).to_pylist(), (0, 3), strict=True):
        counts = np.array(row["labels"]) >= 0  # DistillKit's mask
        ids, values = np.array(row["token_ids"]), np.array(row["top_values"])
        kl.append(kept_kl(np.roll(logits, -start, axis=0), ids, values, counts))
    assert (max(map(abs, kl)) < 1e-6) if shift == 0 else (min(kl) > 1)


def test_plain_rows_by_hand() -> None:
    (row,) = export_formats.plain(HAND_MADE).to_pylist()
    assert row["tokens"] == [5, 6, 7, 8, 1, 9, 3, 0]
    assert row["ids"] == [[6, 0], [7], [], [], [9, 2], [], [], []]
    assert np.allclose(np.exp(row["logprobs"][4]), [0.7, 0.2])
    assert row["loss_mask"] == [True, True, False, False, True, False, False, False]


def test_ids_are_distinct() -> None:
    ids = np.array([[3, 0, -1, -1], [-1, -1, -1, -1], [2, 1, 0, -1], [900, -1, 7, -1]], np.int32)
    assert_array_equal(
        export_formats.fill_absent(ids), [[3, 0, 1, 2], [0, 1, 2, 3], [2, 1, 0, 3], [900, 0, 7, 1]]
    )


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Cache:
    folder = str(tmp_path_factory.mktemp("export") / "cache")
    with open_writer(folder, make_manifest("code", "prose"), VOCABULARY_MAP) as writer:
        for seed, name in enumerate(("code", "prose")):
            write_domain(writer, name, seed)
    return open_cache(folder)


@pytest.mark.parametrize("form", FORMATS)
def test_files_hold_the_caches_rows(cache: Cache, tmp_path: Path, form: str) -> None:
    work = Export(cache, tmp_path / "out", form)
    assert sum(work.write()) == 2 * ROWS["train"]
    for name in cache.domains:
        files = sorted((tmp_path / "out" / name).iterdir())
        assert [file.name for file in files] == ["00000.parquet", "00001.parquet", "00002.parquet"]
        got = [row for file in files for row in pq.read_table(file).to_pylist()]
        assert got == FORMATS[form](cache[name].train.read(np.arange(ROWS["train"]))).to_pylist()


def test_forecast_is_near(cache: Cache, tmp_path: Path) -> None:
    work = Export(cache, tmp_path / "out", "parquet")
    forecasts = work.forecast()
    list(work.write())
    for name, part in forecasts.items():
        assert (part.rows, part.tokens) == (ROWS["train"], cache[name].state.train.tokens)
        stored = sum(file.stat().st_size for file in (tmp_path / "out" / name).iterdir())
        assert stored / 4 < part.bytes < stored * 4  # files of four tiny rows are mostly headers


def test_an_interrupted_export_resumes(cache: Cache, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "export.json#0123456789ab").touch()  # killed at its start
    first = Export(cache, out, "axolotl").write()
    next(first)
    first.close()  # type: ignore[attr-defined]  # a generator
    (out / "code" / "00001.parquet").write_bytes((out / "code" / "00000.parquet").read_bytes()[:-9])
    (out / "code" / "00001.parquet#0123456789ab").write_bytes(b"of an export that was killed")
    done = (out / "code" / "00000.parquet").stat()
    list(Export(cache, out, "axolotl").write())
    assert (out / "code" / "00000.parquet").stat() == done
    assert len(list(out.rglob("*.parquet"))) == 2 * -(-ROWS["train"] // SHARD_ROWS)
    assert not list(out.rglob("*#*"))
    pq.read_table(out / "code" / "00001.parquet")


def test_an_export_of_a_growing_cache_repeats_no_row(tmp_path: Path) -> None:
    """Engines on Ray finish shards out of order."""
    folder, record = tmp_path / "cache", Path("code/train/commits/c/0")
    with open_writer(str(folder), make_manifest("code"), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 1)
    edit(folder / "code" / "zarr.json", lambda state: state.update(complete=False))
    (folder / record).rename(tmp_path / "unfinished")

    def export() -> Export:
        return Export(open_cache(folder, allow_incomplete=True), tmp_path / "out", "parquet", rows=6)

    assert sum(export().write()) == 6
    assert sum(export().write()) == 6  # nothing has changed
    (tmp_path / "unfinished").rename(folder / record)
    with pytest.raises(ConfigError, match="or of fewer finished shards"):
        export()


@pytest.mark.parametrize("link", ["code", "code/00000.parquet", "export.json"])
def test_an_export_never_writes_through_a_link(cache: Cache, tmp_path: Path, link: str) -> None:
    out, outside = tmp_path / "out", tmp_path / "outside"
    list(Export(cache, out, "parquet").write())
    if link == "code":
        outside.mkdir()
        shutil.rmtree(out / link)
    else:
        outside.write_bytes(b"a diary")
        (out / link).unlink()
    (out / link).symlink_to(outside)
    if link == "code":
        with pytest.raises(CacheError, match="code: is a link, where nothing is written"):
            list(Export(cache, out, "parquet").write())
        assert not list(outside.iterdir())
    elif link == "export.json":
        with pytest.raises(ConfigError, match="holds an export of another cache"):
            Export(cache, out, "parquet")
    else:
        list(Export(cache, out, "parquet").write())
        assert not (out / link).is_symlink()
        assert outside.read_bytes() == b"a diary"


def test_some_domains_and_rows(cache: Cache, tmp_path: Path) -> None:
    assert sum(Export(cache, tmp_path / "out", "parquet", ["prose"], 6).write()) == 6
    files = [
        str(path.relative_to(tmp_path / "out")) for path in sorted((tmp_path / "out").rglob("*.parquet"))
    ]
    assert files == ["prose/00000.parquet", "prose/00001.parquet"]
    assert pq.read_table(tmp_path / "out" / files[1]).num_rows == 6 - SHARD_ROWS


def test_mistakes_name_the_option_or_folder(cache: Cache, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--domain law: the cache has code, prose"):
        Export(cache, tmp_path / "out", "parquet", ["law"])
    list(Export(cache, tmp_path / "out", "parquet", rows=1).write())
    assert json.loads((tmp_path / "out" / "export.json").read_text())["rows"] == {"code": 1, "prose": 1}
    with pytest.raises(ConfigError, match="holds an export of another cache, format or choice of rows"):
        Export(cache, tmp_path / "out", "axolotl", rows=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ConfigError, match="is not empty and holds no export"):
        Export(cache, tmp_path / "mine", "parquet")


def test_a_cache_of_labels_exports_to_parquet_only() -> None:
    labels = replace(HAND_MADE, targets=None)
    assert "ids" not in export_formats.plain(labels).column_names
    with pytest.raises(ConfigError, match="the cache holds labels and no distributions; choose parquet"):
        export_formats.axolotl(labels)


def test_the_command_knows_every_format() -> None:
    (kinds,) = (vars(option.type) for option in export.params if option.name == "form")
    assert list(kinds["choices"]) == list(FORMATS)


def test_sampled_targets_have_absent_entries(tmp_path: Path) -> None:
    target = layout.Target(kind="sampled", samples=6)
    with open_writer(str(tmp_path / "cache"), make_manifest("code", target=target), VOCABULARY_MAP) as writer:
        write_domain(writer, "code", 3)
    rows = open_cache(str(tmp_path / "cache"))["code"].train.read([0, 1])
    assert rows.ids is not None
    for row in export_formats.axolotl(rows).to_pylist():
        mask, values = np.array(row["target_mask"], bool), np.array(row["target_logprobs"])
        assert (values[~mask] == NO).all()
        assert np.allclose((np.exp(values) * mask).sum(-1)[mask.any(-1)], 1, atol=1e-3)
        assert all(len(set(ids)) == len(ids) for ids in row["target_token_ids"])
        assert len(row["input_ids"]) in (SEQ_LENGTH // 2, SEQ_LENGTH // 4)
