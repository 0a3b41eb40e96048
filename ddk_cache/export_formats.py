"""Rows of a cache as the tables of other trainers. Pure: rows in, a pyarrow table out.

In all of them place t is about token t + 1, as in the cache: neither axolotl nor DistillKit shifts the
teacher's side, and both compare place t with the student's logits at t.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ddk_cache.errors import ConfigError
from ddk_cache.split_reader import Rows

IGNORED = -100  # a label that carries no loss
ABSENT = -1.0e4  # nats, where a place has fewer entries than others: exp is 0, and it fits into float16

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The rows' documents one after another: L tokens in all, E entries each."""

    lengths: Int64  # [documents]
    tokens: Int64  # [L]
    has_target: NDArray[np.bool_]  # [L]; place t says something about token t + 1
    is_label: NDArray[np.bool_]  # [L]; token t itself is to be predicted
    ids: NDArray[np.int32]  # [L, E]; all different, the absent ones too
    logprobs: NDArray[np.float32]  # [L, E]; ABSENT where absent
    is_entry: NDArray[np.bool_]  # [L, E]


def documents(rows: Rows) -> Documents:
    """Take the rows apart; a document without any target is left out.

    Raises
    ------
    ConfigError
        The cache holds labels alone.
    """
    if rows.ids is None or rows.logprobs is None or rows.ids.shape[-1] == 0:
        raise ConfigError(
            "--format: the cache holds labels and no distributions; only parquet can be written"
        )
    segments = rows.segments.astype(np.int64)
    number = (segments + (np.arange(len(segments)) << 16)[:, None]).reshape(-1)
    found, which, lengths = np.unique(number, return_inverse=True, return_counts=True)
    target = rows.loss_mask.reshape(-1)
    kept = (found & 0xFFFF > 0) & (np.bincount(which, target, minlength=len(found)) > 0)
    at = np.flatnonzero(kept[which])
    width = rows.ids.shape[-1]
    has_target = target[at]
    is_label = np.zeros_like(has_target)
    is_label[1:] = has_target[:-1]  # a document's last place has no target, so none leaks into the next
    ids, logprobs = rows.ids.reshape(-1, width)[at], rows.logprobs.reshape(-1, width)[at]
    is_entry = (ids >= 0) & has_target[:, None]
    return Documents(
        lengths=lengths[kept].astype(np.int64),
        tokens=rows.tokens.reshape(-1)[at].astype(np.int64),
        has_target=has_target,
        is_label=is_label,
        ids=all_different(np.where(is_entry, ids, -1)),
        logprobs=np.where(is_entry, logprobs, np.float32(ABSENT)),
        is_entry=is_entry,
    )


def all_different(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """[L, E]: each -1 replaced by one of the smallest ids that its place does not have.

    Both trainers add up the student's mass over all E ids: one that came twice would count twice.
    """
    found = np.where((ids < 0).all(1, keepdims=True), np.arange(ids.shape[1], dtype=np.int32), ids)
    (partly,) = np.nonzero((found < 0).any(1))
    ids = found[partly]
    absent = ids < 0
    used = np.zeros(ids.shape, bool)  # of the ids below E, which are always enough
    low = ~absent & (ids < ids.shape[1])
    used[np.nonzero(low)[0], ids[low]] = True
    free = np.argsort(used, axis=1, kind="stable").astype(np.int32)
    turn = np.maximum(np.cumsum(absent, axis=1) - 1, 0)
    found[partly] = np.where(absent, np.take_along_axis(free, turn, axis=1), ids)
    return found


def axolotl(rows: Rows) -> pa.Table:
    """Pre-tokenised KD rows, a document each: T is its length, k the target's width."""
    found = documents(rows)
    ones = np.ones(len(found.tokens), np.int8)
    columns: dict[str, NDArray[Any]] = {
        "input_ids": found.tokens.astype(np.int32),
        "attention_mask": ones,
        "labels": np.where(found.is_label, found.tokens, IGNORED).astype(np.int32),
        "target_token_ids": found.ids,
        "target_logprobs": found.logprobs,
        "target_mask": found.is_entry.astype(np.int8),
    }
    return pa.table({name: _lists(values, found.lengths) for name, values in columns.items()})


def distillkit(rows: Rows) -> pa.Table:
    """Rows of equal length: a document each, filled up to S.

    DistillKit takes place t into the distillation loss where ``labels[t]`` is a label, so labels follow the
    targets: the token at t where place t has a target.
    """
    found = documents(rows)
    length = rows.tokens.shape[1]
    count, width = len(found.lengths), found.ids.shape[1]
    begin = np.cumsum(found.lengths) - found.lengths
    document = np.repeat(np.arange(count), found.lengths)
    place = document * length + np.arange(len(document)) - begin[document]

    def filled(values: NDArray[Any], fill: object) -> NDArray[Any]:
        whole = np.full((count * length, *values.shape[1:]), fill, values.dtype)
        whole[place] = values
        return whole

    unused = np.arange(width, dtype=np.int32)
    columns: dict[str, NDArray[Any]] = {
        "input_ids": filled(found.tokens.astype(np.int32), 0),
        "attention_mask": filled(np.ones(len(document), np.int8), 0),
        "labels": filled(np.where(found.has_target, found.tokens, IGNORED).astype(np.int32), IGNORED),
        "token_ids": filled(found.ids, unused),
        "top_values": filled(found.logprobs, ABSENT),
    }
    lengths = np.full(count, length)
    return pa.table({name: _lists(values, lengths) for name, values in columns.items()})


def plain(rows: Rows) -> pa.Table:
    """The cache's own rows: S values each; ``ids`` and ``logprobs`` hold the entries that are there."""
    count, length = rows.tokens.shape
    lengths = np.full(count, length)
    names = ("tokens", "segments", "loss_mask", "label_logprob", "tail_logprob")
    columns = {
        name: _lists(values.reshape(-1), lengths)
        for name in names
        if (values := getattr(rows, name)) is not None
    }
    if rows.ids is not None and rows.logprobs is not None:
        there = rows.ids >= 0
        places = _offsets(there.sum(-1).reshape(-1))
        for name, values in (("ids", rows.ids), ("logprobs", rows.logprobs)):
            inner = pa.ListArray.from_arrays(places, pa.array(values[there]))
            columns[name] = pa.ListArray.from_arrays(_offsets(lengths), inner)
    return pa.table(columns)


def _lists(values: NDArray[Any], lengths: Int64) -> pa.Array:
    """[L] or [L, E], cut into lists of ``lengths`` values."""
    flat = pa.array(values.reshape(-1))
    if values.ndim == 2:
        flat = pa.ListArray.from_arrays(_offsets(np.full(len(values), values.shape[1])), flat)
    return pa.ListArray.from_arrays(_offsets(lengths), flat)


def _offsets(lengths: Int64) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
