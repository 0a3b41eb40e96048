"""Convert rows of a cache to the tables of other trainers. Pure functions: rows in, a pyarrow table out.

In every format, position t is about token t + 1, as in the cache: neither axolotl nor DistillKit shifts the
teacher's side, and both compare position t with the student's logits at t.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ddk_cache.cache.rows import Rows
from ddk_cache.errors import ConfigError

IGNORED = -100  # a label without loss
ABSENT = -1.0e4  # nats, of an absent entry: its exp is 0, and it fits into float16

Int64 = NDArray[np.int64]


@dataclass(frozen=True)
class Documents:
    """The documents of some rows one after another: L tokens in total, E entries per position."""

    lengths: Int64  # [documents]
    tokens: Int64  # [L]
    has_target: NDArray[np.bool_]  # [L]; position t has a target, which is about token t + 1
    is_label: NDArray[np.bool_]  # [L]; token t itself carries loss
    ids: NDArray[np.int32]  # [L, E]; distinct at each position, absent entries included
    logprobs: NDArray[np.float32]  # [L, E]; ABSENT for absent entries
    is_entry: NDArray[np.bool_]  # [L, E]


def documents(rows: Rows) -> Documents:
    """Split rows into documents, and drop documents without targets.

    Raises ConfigError if the cache holds labels alone.
    """
    if rows.ids is None or rows.logprobs is None or rows.ids.shape[-1] == 0:
        raise ConfigError("--format: the cache holds labels and no distributions; choose parquet")
    segments = rows.segments.astype(np.int64)
    document_keys = (segments + (np.arange(len(segments)) << 16)[:, None]).reshape(-1)
    keys, document, lengths = np.unique(document_keys, return_inverse=True, return_counts=True)
    target = rows.loss_mask.reshape(-1)
    kept = (keys & 0xFFFF > 0) & (np.bincount(document, target, minlength=len(keys)) > 0)
    position = np.flatnonzero(kept[document])
    width = rows.ids.shape[-1]
    has_target = target[position]
    is_label = np.zeros_like(has_target)
    is_label[1:] = has_target[:-1]  # a document's last position has no target, so documents do not mix
    ids, logprobs = rows.ids.reshape(-1, width)[position], rows.logprobs.reshape(-1, width)[position]
    is_entry = (ids >= 0) & has_target[:, None]
    return Documents(
        lengths=lengths[kept].astype(np.int64),
        tokens=rows.tokens.reshape(-1)[position].astype(np.int64),
        has_target=has_target,
        is_label=is_label,
        ids=fill_absent(np.where(is_entry, ids, -1)),
        logprobs=np.where(is_entry, logprobs, np.float32(ABSENT)),
        is_entry=is_entry,
    )


def fill_absent(ids: NDArray[np.int32]) -> NDArray[np.int32]:
    """Replace each -1 in ``ids`` [L, E] by one of the smallest ids that its position does not have.

    Both trainers sum the student's mass over all E ids, so that a repeated id would count twice.
    """
    filled = np.where((ids < 0).all(1, keepdims=True), np.arange(ids.shape[1], dtype=np.int32), ids)
    (partial,) = np.nonzero((filled < 0).any(1))
    ids = filled[partial]
    absent = ids < 0
    used = np.zeros(ids.shape, bool)  # of the ids below E, which always suffice
    low = ~absent & (ids < ids.shape[1])
    used[np.nonzero(low)[0], ids[low]] = True
    free = np.argsort(used, axis=1, kind="stable").astype(np.int32)
    rank = np.maximum(np.cumsum(absent, axis=1) - 1, 0)
    filled[partial] = np.where(absent, np.take_along_axis(free, rank, axis=1), ids)
    return filled


def axolotl(rows: Rows) -> pa.Table:
    """Return pre-tokenised KD rows: one document each, with lists of its length and [length, E]."""
    docs = documents(rows)
    columns: dict[str, NDArray[Any]] = {
        "input_ids": docs.tokens.astype(np.int32),
        "attention_mask": np.ones(len(docs.tokens), np.int8),
        "labels": np.where(docs.is_label, docs.tokens, IGNORED).astype(np.int32),
        "target_token_ids": docs.ids,
        "target_logprobs": docs.logprobs,
        "target_mask": docs.is_entry.astype(np.int8),
    }
    return pa.table({name: _lists(values, docs.lengths) for name, values in columns.items()})


def distillkit(rows: Rows) -> pa.Table:
    """Return rows of equal length S: one document each, padded, with lists of S and [S, E].

    DistillKit computes the distillation loss where ``labels[t]`` is a label, so a label here is the token at
    t where position t has a target.
    """
    docs = documents(rows)
    length = rows.tokens.shape[1]
    count, width = len(docs.lengths), docs.ids.shape[1]
    begin = np.cumsum(docs.lengths) - docs.lengths
    document = np.repeat(np.arange(count), docs.lengths)
    position = document * length + np.arange(len(document)) - begin[document]

    def padded(values: NDArray[Any], fill: object) -> NDArray[Any]:
        result = np.full((count * length, *values.shape[1:]), fill, values.dtype)
        result[position] = values
        return result

    unused = np.arange(width, dtype=np.int32)
    columns: dict[str, NDArray[Any]] = {
        "input_ids": padded(docs.tokens.astype(np.int32), 0),
        "attention_mask": padded(np.ones(len(document), np.int8), 0),
        "labels": padded(np.where(docs.has_target, docs.tokens, IGNORED).astype(np.int32), IGNORED),
        "token_ids": padded(docs.ids, unused),
        "top_values": padded(docs.logprobs, ABSENT),
    }
    lengths = np.full(count, length)
    return pa.table({name: _lists(values, lengths) for name, values in columns.items()})


def plain(rows: Rows) -> pa.Table:
    """Return the cache's rows with lists of S; ``ids`` and ``logprobs`` hold only present entries."""
    count, length = rows.tokens.shape
    lengths = np.full(count, length)
    names = ("tokens", "segments", "loss_mask", "label_logprob", "writer_logprob", "tail_logprob")
    columns = {
        name: _lists(values.reshape(-1), lengths)
        for name in names
        if (values := getattr(rows, name)) is not None
    }
    if rows.ids is not None and rows.logprobs is not None:
        is_entry = rows.ids >= 0
        offsets = _offsets(is_entry.sum(-1).reshape(-1))
        for name, values in (("ids", rows.ids), ("logprobs", rows.logprobs)):
            inner = pa.ListArray.from_arrays(offsets, pa.array(values[is_entry]))
            columns[name] = pa.ListArray.from_arrays(_offsets(lengths), inner)
    return pa.table(columns)


def _lists(values: NDArray[Any], lengths: Int64) -> pa.Array:
    """Cut ``values`` [L] or [L, E] into lists of ``lengths`` values."""
    flat = pa.array(values.reshape(-1))
    if values.ndim == 2:
        flat = pa.ListArray.from_arrays(_offsets(np.full(len(values), values.shape[1])), flat)
    return pa.ListArray.from_arrays(_offsets(lengths), flat)


def _offsets(lengths: Int64) -> pa.Array:
    return pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
