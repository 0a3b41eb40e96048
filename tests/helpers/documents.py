"""Documents of given lengths, documents of a data set, and the chunks in rows."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ddk_build.config import DomainConfig
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.documents import Document, IngestStatistics
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.holdout import SplitSettings, Splitter
from ddk_build.data.packing.packer import Arrays, Row
from ddk_cache.format.layout import SplitName

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Chunk = tuple[int, ...]


def write_rows(path: Path, rows: Iterable[Any]) -> str:
    """Write a jsonl file and return its path; rows in bytes are written unchanged."""
    lines = [row if isinstance(row, bytes) else json.dumps(row).encode() for row in rows]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return str(path)


def read_documents(
    tokenizer: "PreTrainedTokenizerBase",
    statistics: IngestStatistics | None = None,
    *,
    seq_length: int = 10**6,
    seed: int = 0,
    **domain: Any,
) -> list[Document]:
    """Return the documents of a domain called code."""
    maker = DocumentMaker("code", DomainConfig(**domain), tokenizer, seed, seq_length)
    return list(maker.documents(statistics or IngestStatistics()))


def make_documents(lengths: Sequence[int], seed: int = 0) -> list[Document]:
    """Return documents of the given lengths; all tokens differ, and count from 1."""
    random = np.random.default_rng(seed)
    digests = random.permutation(max(len(lengths), 1)) * 1000
    starts = np.cumsum([1, *lengths])
    return [
        Document(np.arange(start, start + length, dtype=np.int32), random.random(length) < 0.7, int(digest))
        for start, length, digest in zip(starts, lengths, digests, strict=False)
    ]


def segments(batches: Iterable[Arrays]) -> list[Chunk]:
    """Return the tokens of every segment, row by row."""
    return [
        tuple(tokens[numbers == number].tolist())
        for rows in batches
        for tokens, numbers in zip(rows["tokens"], rows["segments"], strict=True)
        for number in range(1, int(numbers.max()) + 1)
    ]


def count_rows(batches: Iterable[Arrays]) -> int:
    return sum(len(rows["tokens"]) for rows in batches)


def all_chunks(documents: Iterable[Document], seq_length: int) -> list[Chunk]:
    return [
        tuple(document.tokens[start : start + seq_length].tolist())
        for document in documents
        for start in range(0, len(document), seq_length)
    ]


def split_documents(
    documents: Sequence[Document],
    settings: SplitSettings,
    statistics: IngestStatistics,
    index: DocumentIndex | None = None,
    others: Iterable[DocumentIndex] = (),
) -> Iterator[tuple[SplitName, Row]]:
    """Yield all rows that a ``Splitter`` makes of a domain's documents, train before validation."""
    splitter = Splitter(settings, statistics, DocumentIndex() if index is None else index, others)
    yield from (("train", row) for row in splitter.add(documents))
    yield from splitter.finish()
