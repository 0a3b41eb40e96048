"""Rows: targets at labelled positions, their views at all positions; and what a notebook shows of a cache."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_array_equal

import ddk_cache
from ddk_cache.cache.reader import Cache
from ddk_cache.cache.rows import Rows, document_logprobs


@pytest.fixture
def cache(cache_folder: Path) -> Cache:
    return ddk_cache.open_cache(cache_folder)  # os.PathLike


def same(rows: Rows, others: Rows) -> None:
    assert rows.arrays().keys() == others.arrays().keys()
    for name, array in rows.arrays().items():
        assert_array_equal(array, others.arrays()[name], err_msg=name)


def test_views_show_the_targets_where_there_is_loss(cache: Cache) -> None:
    rows = cache["code"].train.read([3, 1, 3])
    assert rows.targets is not None
    assert rows.ids is not None
    assert rows.tail_logprob is not None
    assert len(rows.targets) == np.count_nonzero(rows.loss_mask)
    assert_array_equal(rows.ids[rows.loss_mask], rows.targets.ids)
    assert (rows.ids[~rows.loss_mask] == -1).all()
    assert np.isneginf(rows.tail_logprob[~rows.loss_mask]).all()
    same(Rows.from_arrays(rows.arrays()), rows)


@pytest.mark.parametrize("targets", [True, False])
def test_rows_are_cut_and_joined(cache: Cache, targets: bool) -> None:
    rows = cache["code"].train.read(range(7), targets=targets)
    assert len(rows) == 7
    same(Rows.concatenate([rows[:2], rows[2:3], rows[3:]]), rows)
    same(rows[1:6:2], cache["code"].train.read([1, 3, 5], targets=targets))
    same(rows[4:4], cache["code"].train.read([], targets=targets))
    assert_array_equal(rows[5].tokens, rows.tokens[5])
    assert_array_equal(rows[-1].ids, rows.ids[-1] if rows.ids is not None else None)


MASK = np.arange(10) == 7


@pytest.mark.parametrize("rows", [MASK, [1.7], [2**70], ["1"], [[1]], 1, None])
def test_rows_are_read_by_integers(cache: Cache, rows: Any) -> None:
    with pytest.raises(ValueError, match="rows must be a list of row indices, not "):
        cache["code"].train.read(rows)


def test_a_single_row_is_a_batch_of_one(cache: Cache) -> None:
    class Tokenizer:
        def decode(self, token_ids: list[int], /) -> str:
            return " ".join(map(str, token_ids))

    split = cache["code"].train
    single, batch = split[5], split[5:6]
    assert single.tokens.ndim == 1
    assert single.decode(Tokenizer()) == batch.decode(Tokenizer())
    assert [len(texts) for texts in single.decode(Tokenizer())] == [2]
    assert single._repr_html_().partition("<table>")[2] == batch._repr_html_().partition("<table>")[2]
    for one, other in zip(document_logprobs(single), document_logprobs(batch), strict=True):
        assert_array_equal(one, other)
    same(Rows.concatenate([split[5], split[2]]), split.read([5, 2]))


def test_reprs_say_what_is_there(cache: Cache) -> None:
    shown = repr(cache)
    assert shown.startswith(f"<Cache {cache.storage.url}: rows of 16 tokens, top 5 of teacher")
    assert shown.count("\n") == 2
    target = cache.target.model_copy(update={"top_p": 0.9})
    cache.manifest = cache.manifest.model_copy(update={"target": target})
    assert ", top 5 inside the 0.9 nucleus of teacher" in repr(cache)
    train = cache["code"].state.train
    assert f"<Domain code: train {train.rows} rows, {train.tokens} tokens; validation " in shown
    assert repr(cache["code"].train) == f"<Split code/train: {train.rows} rows, {train.tokens} tokens>"
    assert repr(cache["code"].train.read([0, 1])).startswith("<Rows: 2 x 16 tokens, ")
    assert repr(cache["code"].train[0]).startswith("<Rows: 16 tokens, ")
    assert "entries" not in repr(cache["code"].validation.read([0]))


def test_the_notebooks_table_is_escaped(cache: Cache) -> None:
    teacher = cache.manifest.teachers[0].model_copy(update={"model": "<script>&"})
    cache.manifest = cache.manifest.model_copy(update={"teachers": (teacher,)})
    table = cache._repr_html_()
    assert "<script>" not in table
    assert "&lt;script&gt;&amp;" in table
    assert table.count("<tr>") == 3
