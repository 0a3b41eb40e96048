"""Documents that are longer than a row, in chunks."""

import itertools
from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from ddk_build.data.documents import Document
from ddk_build.data.packing.chunks import UNANSWERED, chunk_document


@given(st.integers(2, 200), st.integers(2, 30), st.integers(0, 15), st.integers(0, 1))
def test_a_long_text_is_cut_with_context_in_front(
    length: int, seq_length: int, overlap: int, prefix_length: int
) -> None:
    """Every token is there, in order, and a label once at most; what is repeated carries no loss."""
    overlap = min(overlap, seq_length // 2)
    prefix_length = min(prefix_length, seq_length // 2 - overlap)
    document = Document(
        np.arange(length, dtype=np.int32), np.ones(length, np.bool_), 0, max(prefix_length, 0)
    )
    chunks = chunk_document(document, seq_length, overlap)
    assert all(len(chunk) <= seq_length for chunk in chunks)
    new = np.concatenate([chunk.tokens[chunk.context_length :] for chunk in chunks])
    assert new.tolist() == list(range(length))
    for before, chunk in itertools.pairwise(chunks):
        start = int(chunk.tokens[chunk.context_length])
        assert chunk.tokens[:prefix_length].tolist() == list(range(prefix_length))
        assert chunk.tokens[prefix_length : chunk.context_length].tolist() == list(
            range(max(start - overlap, prefix_length), start)
        )
        assert not chunk.carries_loss[: chunk.context_length].any()
        # After a BOS token alone the next token cannot be predicted.
        assert chunk.carries_loss[chunk.context_length :].all() == (
            not prefix_length or chunk.context_length > prefix_length
        )
        assert int(before.tokens[-1]) == start - 1


def test_a_conversation_is_cut_in_front_of_its_questions() -> None:
    """System message of 2 tokens; exchanges of 6, 6, 20 and 4, each a question of 2 and its answer."""
    carries_loss, cut_points = [False] * 2, []
    for size in (6, 6, 20, 4):
        cut_points.append(len(carries_loss))
        carries_loss += [False] * 2 + [True] * (size - 2)
    document = Document(
        np.arange(38, dtype=np.int32),
        np.array(carries_loss),
        0,
        prefix_length=2,
        cut_points=np.array(cut_points[1:]),
    )
    skipped: Counter[str] = Counter()
    chunks = chunk_document(document, 14, skipped=skipped)
    assert [chunk.tokens.tolist() for chunk in chunks] == [
        list(range(14)),
        [0, 1, *range(14, 26)],
        [0, 1, *range(34, 38)],
    ]
    assert [chunk.carries_loss.tolist() for chunk in chunks] == [
        carries_loss[:14],
        [False, False, *carries_loss[14:26]],
        [False, False, *carries_loss[34:]],
    ]
    assert skipped == {UNANSWERED: 8}
