"""Rows of a split in memory. numpy only; nothing here depends on training."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from html import escape
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ddk_cache.format.codec import Targets, row_spans

MOST_SHOWN = 20  # rows in a notebook's table


class Tokenizer(Protocol):
    """Anything that turns token ids into text, as transformers' tokenizers do."""

    def decode(self, token_ids: list[int], /) -> str: ...


@dataclass(frozen=True, eq=False, repr=False)
class Rows:
    """Rows of a split. Position t holds the distribution over token t+1, given its document up to t.

    ``ids``, ``logprobs`` and ``tail_logprob`` are views of ``targets``, filled up to all positions when first
    asked for.
    """

    tokens: NDArray[np.int32]
    """[n, S]; 0 in the padding."""
    segments: NDArray[np.uint16]
    """[n, S]; 0 = padding, 1.. = index of the document in its row."""
    loss_mask: NDArray[np.bool_]
    """[n, S]; position t has a label, the token at t+1, and it counts."""
    label_logprob: NDArray[np.float32] | None = None
    """[n, S]; log p(token t+1) in nats at temperature 1, exact; 0 where no label counts."""
    targets: Targets | None = None
    """At the M positions where ``loss_mask`` is True, row after row."""
    writer_logprob: NDArray[np.float32] | None = None
    """[n, S]; log p(token t+1) in nats by the model that wrote the text, on a grid of 1/256; 0 where no label
    counts. None in a domain without."""

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> "Rows":
        """Make rows from arrays by name: the inverse of ``arrays``."""
        columns: dict[str, Any] = {field.name: arrays.get(field.name) for field in fields(cls)}
        if "ids" in arrays:
            columns["targets"] = Targets.from_arrays(arrays, arrays["loss_mask"])
        return cls(**columns)

    @cached_property
    def ids(self) -> NDArray[np.int32] | None:
        """[n, S, E]; best first, -1 where an entry is absent."""
        return None if self.targets is None else self._at_all_positions(self.targets.ids, -1)

    @cached_property
    def logprobs(self) -> NDArray[np.float32] | None:
        """[n, S, E]; nats, of the target at its temperature; -inf where an entry is absent."""
        return None if self.targets is None else self._at_all_positions(self.targets.logprobs, -np.inf)

    @cached_property
    def tail_logprob(self) -> NDArray[np.float32] | None:
        """[n, S]; nats, log of the mass outside the entries; -inf where none is left."""
        return None if self.targets is None else self._at_all_positions(self.targets.tail_logprob, -np.inf)

    def _at_all_positions(self, values: NDArray[Any], fill: float) -> NDArray[Any]:
        filled = np.full((*self.loss_mask.shape, *values.shape[1:]), fill, values.dtype)
        filled[self.loss_mask] = values
        return filled

    def decode(self, tokenizer: "Tokenizer") -> list[list[str]]:
        """Return the text of each row's documents, with special tokens, by any tokenizer with ``decode``.

        A single row is a list of one.
        """
        texts = []
        for tokens, segments in zip(np.atleast_2d(self.tokens), np.atleast_2d(self.segments), strict=True):
            row, documents = tokens[segments > 0], segments[segments > 0]
            parts = np.split(row, np.flatnonzero(np.diff(documents)) + 1)
            texts.append([tokenizer.decode(part.tolist()) for part in parts if part.size])
        return texts

    def arrays(self) -> dict[str, NDArray[Any]]:
        """Return the arrays that were read, by name, [n, S] or [n, S, E]."""
        names = ["tokens", "segments", "loss_mask", "label_logprob", "writer_logprob"]
        names += ["ids", "logprobs", "tail_logprob"]
        return {name: values for name in names if (values := getattr(self, name)) is not None}

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, row: int | slice) -> "Rows":
        """Return one row, without the first dimension: [S] and [S, E]; or a slice of rows."""
        targets = self.targets
        if targets is not None:
            spans = list(row_spans(self.loss_mask))
            chosen = spans[row] if isinstance(row, slice) else [spans[row]]
            targets = Targets.concatenate([targets[span] for span in chosen] or [targets[:0]])
        columns: dict[str, Any] = {
            field.name: None if (values := getattr(self, field.name)) is None else values[row]
            for field in fields(self)
            if field.name != "targets"
        }
        return Rows(**columns, targets=targets)

    @classmethod
    def concatenate(cls, parts: Sequence["Rows"]) -> "Rows":
        """Join rows, or single rows, at least one part, that were read with the same arrays."""
        columns: dict[str, Any] = {}
        for field in fields(cls):
            values: list[Any] = [getattr(part, field.name) for part in parts]
            join: Any = Targets.concatenate if field.name == "targets" else np.vstack
            columns[field.name] = None if values[0] is None else join(values)
        return cls(**columns)

    def __repr__(self) -> str:
        shape = " x ".join(f"{size:,}" for size in self.tokens.shape)
        parts = [f"{shape} tokens", f"{np.count_nonzero(self.loss_mask):,} with loss"]
        if self.targets is not None:
            parts.append(f"up to {self.targets.ids.shape[1]} entries each")
        if self.label_logprob is not None and self.loss_mask.any():
            parts.append(f"teacher at {-self.label_logprob[self.loss_mask].mean():.3f} nats a label")
        return f"<Rows: {', '.join(parts)}>"

    def _repr_html_(self) -> str:
        """Return a table for notebooks: a line for each of the first rows."""
        rows = []
        masks = np.atleast_2d(self.loss_mask)[:MOST_SHOWN]
        for row, (segments, mask) in enumerate(zip(np.atleast_2d(self.segments), masks, strict=False)):
            cells: list[Any] = [row, segments.max(), np.count_nonzero(segments), np.count_nonzero(mask)]
            if self.label_logprob is not None:
                logprobs = np.atleast_2d(self.label_logprob)[row]
                cells.append(f"{-logprobs[mask].mean():.3f}" if mask.any() else "")
            rows.append(cells)
        header = ["row", "documents", "tokens", "with loss"]
        header += ["teacher, nats a label"] * (self.label_logprob is not None)
        return html_table(repr(self), header, rows)


def html_table(title: str, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table for notebooks."""

    def line(tag: str, cells: Sequence[Any]) -> str:
        return f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"

    body = "".join(line("td", cells) for cells in rows)
    return f"{escape(title)}<table><thead>{line('th', header)}</thead><tbody>{body}</tbody></table>"


def document_logprobs(
    rows: Rows,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """Sum the teacher's log-probabilities over each document, or chunk of one.

    exp(-sum / labels) is the document's perplexity.

    Returns
    -------
    Four arrays [documents]: the row's index in ``rows``, the segment, its number of labels, and the sum of
    their log-probabilities in nats. Documents without a label are left out.
    """
    assert rows.label_logprob is not None
    mask, segments, logprobs = map(np.atleast_2d, (rows.loss_mask, rows.segments, rows.label_logprob))
    row, position = (index.astype(np.int64) for index in np.nonzero(mask))
    segment = segments[row, position].astype(np.int64)
    keys, document = np.unique(row << 16 | segment, return_inverse=True)
    labels = np.bincount(document, minlength=len(keys)).astype(np.int64)
    sums = np.bincount(document, logprobs[row, position], len(keys)).astype(np.float64)
    return keys >> 16, keys & 0xFFFF, labels, sums
