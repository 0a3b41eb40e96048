"""Packing: no token is lost or repeated, and rows are full."""

import numpy as np
import pytest
from helpers.documents import all_chunks, make_documents, segments
from hypothesis import given
from hypothesis import strategies as st

from ddk_build.data.documents import ColumnarDocuments, Document
from ddk_build.data.packing.packer import MOST_SEGMENTS, Packer, Row, add_documents, to_arrays
from ddk_cache.format.writer_logprob import STEPS


def pack(documents: list[Document], packer: Packer) -> list[Row]:
    return [*add_documents(packer, documents), *packer.flush()]


lengths_of_documents = st.lists(st.integers(2, 60), min_size=2, max_size=60)


@given(lengths_of_documents, st.integers(2, 24), st.integers(1, 5))
def test_packing_keeps_every_token_once_and_in_order(
    lengths: list[int], seq_length: int, open_rows: int
) -> None:
    documents = make_documents(lengths)
    rows = to_arrays(pack(documents, Packer(seq_length, open_rows)), seq_length)
    assert sorted(segments([rows])) == sorted(all_chunks(documents, seq_length))
    for tokens, numbers in zip(rows["tokens"], rows["segments"], strict=True):
        used = int((numbers > 0).sum())
        assert used > 0
        assert (np.diff(numbers[:used].astype(int)) >= 0).all()
        assert not numbers[used:].any()
        assert not tokens[used:].any()


@given(lengths_of_documents, st.integers(2, 24), st.integers(0, 4))
def test_a_label_keeps_the_writers_log_probability_of_its_token(
    lengths: list[int], seq_length: int, overlap: int
) -> None:
    """In documents that are cut with context, sent to another process, and packed."""
    documents = make_documents(lengths)
    for document in documents:
        document.writer_logprob = -document.tokens.astype(np.float32) / STEPS
    packer = Packer(seq_length)
    sent = ColumnarDocuments.of(documents).to_documents()
    rows = [*add_documents(packer, sent, min(overlap, seq_length // 2)), *packer.flush()]
    arrays = to_arrays(rows, seq_length, writer_logprob=True)
    tokens, mask, steps = (arrays[name] for name in ("tokens", "loss_mask", "writer_logprob"))
    assert (steps[:, :-1][mask[:, :-1]] == tokens[:, 1:][mask[:, :-1]]).all()
    assert not steps[~mask].any()


@given(lengths_of_documents, st.integers(2, 24))
def test_a_position_has_a_label_where_the_next_token_is_of_its_segment_and_counts(
    lengths: list[int], seq_length: int
) -> None:
    documents = make_documents(lengths)
    carries_loss = np.concatenate([[False], *(document.carries_loss for document in documents)])  # by token
    rows = to_arrays(pack(documents, Packer(seq_length)), seq_length)
    for tokens, numbers, mask in zip(rows["tokens"], rows["segments"], rows["loss_mask"], strict=True):
        for t in range(seq_length):
            same = t + 1 < seq_length and numbers[t] > 0 and numbers[t] == numbers[t + 1]
            assert mask[t] == (same and carries_loss[tokens[t + 1]])


@pytest.mark.parametrize("seq_length", [128, 1024])
def test_rows_are_nearly_full(seq_length: int) -> None:
    random = np.random.default_rng(5)
    lengths = np.clip(random.lognormal(5.5, 1.2, 4000), 2, 20_000).astype(int).tolist()
    rows = to_arrays(pack(make_documents(lengths), Packer(seq_length)), seq_length)
    assert (rows["segments"] > 0).mean() > 0.97


def test_a_row_holds_no_more_segments_than_uint16_counts() -> None:
    one = Document(np.array([1], np.int32), np.array([True]), 0)
    rows = pack([one] * (MOST_SEGMENTS + 1), Packer(100_000))
    assert list(map(len, rows)) == [MOST_SEGMENTS, 1]
    assert to_arrays(rows[:1], 100_000)["segments"].max() == MOST_SEGMENTS
