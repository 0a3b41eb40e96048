"""A shard's bytes as a stranger may have written them: refused before they take memory."""

import tracemalloc

import numpy as np
import pytest
from helpers.caches import SEQ_LENGTH
from helpers.hostile import CHUNKS

from ddk_cache.format import commit_record, layout, shards, validate
from ddk_cache.format.layout import RowArray

ARRAYS = layout.token_arrays(SEQ_LENGTH)


@pytest.mark.parametrize(
    ("name", "body"), [chunk[1:3] for chunk in CHUNKS], ids=[chunk[0] for chunk in CHUNKS]
)
def test_a_chunk_of_another_size_takes_no_memory(name: str, body: bytes) -> None:
    row, chunk = np.empty(SEQ_LENGTH, ARRAYS[name].dtype), shards.add_checksum(body)
    tracemalloc.start()
    with pytest.raises(ValueError, match=r".+"):
        shards.decode_into(row, chunk, ARRAYS[name])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "spans",
    [
        [(0, 10), (5, 10)],
        [(10, 10), (0, 10)],
        [(2**63, 2**63), (0, 0)],
        [(0, 2**40), (2**40, 1)],
        [(2**64 - 8, 16), (8, 8)],
    ],
)
def test_an_index_that_points_elsewhere_is_refused(spans: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="index"):
        shards.parse_index(shards.add_checksum(np.array(spans, "<u8").tobytes()), 2, 20)


def test_offsets_go_beyond_4_gib() -> None:
    index = np.array([(0, 1 << 30), *((n << 30, 1 << 30) for n in range(1, 8))], "<u8")
    lengths = shards.parse_index(shards.add_checksum(index.tobytes()), 8, 8 << 30)
    assert int(np.cumsum(lengths)[-1]) == 8 << 30


def test_bytes_behind_the_chunks_are_refused() -> None:
    array = RowArray("uint32", 16, "pcodec")
    data = shards.encode(np.zeros((2, 16), np.uint32), array, 2)
    assert (shards.decode(data, array, 2) == 0).all()
    with pytest.raises(ValueError, match="one after another"):
        shards.decode(b"x" + data, array, 2)


def test_a_commit_record_belongs_to_one_shard() -> None:
    array = RowArray("uint32", 16, "pcodec")
    data = shards.encode(np.arange(48, dtype=np.uint32).reshape(3, 16), array, 4)
    record = commit_record.describe([data], 3, 4)
    stored = record.serialise(b"here")
    assert len(stored) == commit_record.record_size(1, 4)
    parsed = commit_record.parse(stored, b"here", 1)
    assert (parsed.rows, parsed.shard_rows) == (3, 4)
    for wrong, identity in (
        (stored, b"there"),
        (stored + b"\0", b"here"),
        (stored[:-1], b"here"),
        (b"", b"here"),
        (commit_record.CommitRecord(5, record.arrays).serialise(b"here"), b"here"),
    ):
        with pytest.raises(ValueError, match="commit record"):
            commit_record.parse(wrong, identity, 1)


GOOD = {"tokens": [[5, 6, 7, 0]], "segments": [[1, 1, 2, 0]], "loss_mask": [[1, 0, 0, 0]]}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", [[5, 10, 7, 0]]),
        ("tokens", [[5, 2**32 - 1, 7, 0]]),
        ("segments", [[1, 1, 3, 0]]),
        ("segments", [[2, 2, 3, 0]]),
        ("segments", [[1, 2, 1, 0]]),
        ("segments", [[1, 0, 1, 0]]),
        ("segments", [[0, 1, 1, 1]]),
        ("loss_mask", [[2, 0, 0, 0]]),
        ("loss_mask", [[1, 1, 0, 0]]),
        ("loss_mask", [[0, 0, 1, 0]]),
        ("loss_mask", [[0, 0, 0, 1]]),
    ],
)
def test_rows_that_contradict_each_other(name: str, value: list[list[int]]) -> None:
    def check(rows: dict[str, list[list[int]]]) -> None:
        validate.check_tokens(
            np.array(rows["tokens"], np.uint32),
            np.array(rows["segments"], np.uint16),
            np.array(rows["loss_mask"], np.uint8),
            10,
        )

    check(GOOD)
    with pytest.raises(ValueError, match=r".+"):
        check(GOOD | {name: value})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.5])
def test_labels_that_are_no_log_probabilities(value: float) -> None:
    mask = np.array([[1, 0]], np.uint8)
    validate.check_labels(np.array([[-1, 0]], np.float32), mask)
    for wrong in ([[value, 0]], [[-1, -1]]):
        with pytest.raises(ValueError, match="label"):
            validate.check_labels(np.array(wrong, np.float32), mask)
