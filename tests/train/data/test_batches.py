"""Rows to batches: positions, labels, what is left out; and reading ahead, in order, with its errors."""

import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.training import SEQ_LENGTH

import ddk_cache
from ddk_cache.errors import CacheError
from ddk_train.data.batches import Layout, document_positions, make_batch, read_ahead, reader


def test_positions_begin_anew_in_every_document() -> None:
    segments = np.array([[1, 1, 1, 2, 3, 3, 0, 0], [1, 1, 1, 1, 1, 1, 1, 1]], np.uint16)
    expected = [[0, 1, 2, 0, 0, 1, 0, 1], [0, 1, 2, 3, 4, 5, 6, 7]]
    assert document_positions(segments).tolist() == expected


def test_a_batch_holds_the_positions_with_loss_and_their_labels(cache_folder: Path) -> None:
    split = ddk_cache.open_cache(str(cache_folder))["code"].train
    rows = split.read([3, 1])
    batch = make_batch({0: rows}, vocab_size=400)
    assert rows.ids is not None
    row, column = np.nonzero(rows.loss_mask)
    assert batch.labels.tolist() == rows.tokens[row, column + 1].tolist()
    assert batch.ids is not None
    assert batch.ids.tolist() == rows.ids[row, column].tolist()
    assert batch.tokens.flatten()[batch.label_positions].tolist() == rows.tokens[row, column].tolist()
    assert (batch.ids >= 0).any(-1).all()  # no place without a teacher's answer
    assert batch.text_tokens == int((rows.segments > 0).sum())
    assert {batch.tokens.dtype, batch.ids.dtype, batch.positions.dtype} == {torch.int32}


def test_rows_of_several_domains_come_together(cache_folder: Path) -> None:
    cache = ddk_cache.open_cache(str(cache_folder))
    read = reader(cache, targets=[True] * 3, vocab_size=400)
    batch = read(np.array([2, 0, 2]), np.array([1, 5, 7]))
    expected = [cache["code"].train.read([5]).tokens, cache["law"].train.read([1, 7]).tokens]
    np.testing.assert_array_equal(batch.tokens.numpy(), np.concatenate(expected))
    owners = np.repeat([0, 2, 2], SEQ_LENGTH)  # of each position, in the order of the batch's rows
    np.testing.assert_array_equal(batch.domain.numpy(), owners[batch.label_positions.numpy()])


def test_without_targets_there_are_none(cache_folder: Path) -> None:
    read = reader(ddk_cache.open_cache(str(cache_folder)), targets=[False] * 3, vocab_size=400)
    batch = read(np.array([0]), np.array([0]))
    assert (batch.ids, batch.logprobs, batch.tail_logprob) == (None, None, None)


def test_entries_beyond_the_students_head_count_as_tail(cache_folder: Path) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read([0, 1, 2, 3])
    rows = replace(rows, tokens=rows.tokens % 200)
    whole, cut = make_batch({0: rows}, vocab_size=400), make_batch({0: rows}, vocab_size=200)
    assert cut.ids is not None
    assert cut.logprobs is not None
    assert cut.tail_logprob is not None
    assert whole.logprobs is not None
    assert whole.tail_logprob is not None
    assert (cut.ids < 200).all()
    assert (cut.ids == -1).sum() > 0
    assert torch.equal(cut.ids == -1, cut.logprobs == -torch.inf)
    masses = (
        whole.logprobs.exp().sum(-1) + whole.tail_logprob.exp(),
        cut.logprobs.exp().sum(-1) + cut.tail_logprob.exp(),
    )
    torch.testing.assert_close(*masses)


@pytest.mark.parametrize("wrong", [400, 2**31 - 1, -1])
def test_a_token_that_the_student_has_not_is_one_line(cache_folder: Path, wrong: int) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read([0, 1])
    rows.tokens[1, 5] = wrong
    with pytest.raises(
        CacheError, match=f"a row holds the token {wrong}; the student has the tokens 0 to 399"
    ):
        make_batch({0: rows}, 400)


def test_documents_are_rows_of_their_own_where_a_student_needs_it(cache_folder: Path) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read(range(12))
    packed = make_batch({0: rows}, 400)
    apart = make_batch({0: rows}, 400, Layout(packed=False))
    flat = torch.cat([packed.tokens.flatten()[index].flatten() for index in apart.documents])
    assert torch.equal(flat[apart.label_positions], packed.tokens.flatten()[packed.label_positions])
    assert torch.equal(apart.labels, packed.labels)
    lengths = [index.shape[1] for index in apart.documents]
    assert lengths == sorted(lengths)
    assert flat.numel() < 2 * packed.text_tokens
    for index in apart.documents:  # each row is one document from its beginning
        assert (packed.positions.flatten()[index[:, 0]] == 0).all()
        position = packed.positions.flatten()[index]
        ahead = position == torch.arange(index.shape[1])
        assert (ahead | (index == index[:, -1:])).all()  # padding repeats the last token


def test_long_documents_stand_apart_from_short_ones(cache_folder: Path) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read(range(12))
    for index in make_batch({0: rows}, 400, Layout(packed=False, isolate_above=6)).documents:
        lengths = [len(np.unique(row)) for row in index.numpy()]
        assert max(lengths) <= 6 or min(lengths) > 6


def test_a_batch_without_labels_still_goes_through_the_student(cache_folder: Path) -> None:
    rows = ddk_cache.open_cache(str(cache_folder))["code"].train.read([0])
    rows = replace(rows, loss_mask=np.zeros_like(rows.loss_mask), targets=None)
    batch = make_batch({0: rows}, 400, Layout(packed=False))
    assert [index.tolist() for index in batch.documents] == [[[0]]]
    assert len(batch.labels) == len(batch.label_positions) == 0


def test_reading_ahead_keeps_the_order_and_the_bound() -> None:
    begun: list[int] = []
    gate = threading.Event()

    def slow(item: int) -> int:
        begun.append(item)
        if item == 0:
            gate.wait(10)
        return item * 10

    results = read_ahead(slow, range(20), threads=3, ahead=4)
    threading.Timer(0.2, gate.set).start()
    assert next(results) == 0  # items 1 and 2 were done long before
    assert max(begun) <= 4
    assert list(results) == [item * 10 for item in range(1, 20)]


def test_an_error_in_a_thread_comes_at_its_turn() -> None:
    def fail_at_three(item: int) -> int:
        if item == 3:
            raise OSError("disk on fire")
        return item

    results = read_ahead(fail_at_three, range(10), threads=2, ahead=4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(OSError, match="disk on fire"):
        next(results)
