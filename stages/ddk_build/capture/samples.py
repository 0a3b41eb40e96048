"""Samples of the corpus that a teacher reads first: documents for its check, rows for its codebook."""

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.scoring import requests
from ddk_build.config import BuildConfig
from ddk_build.data import sources
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.packing.chunks import chunk_document
from ddk_cache.cache.writer import Writer
from ddk_cache.format import layout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHECK_TOKENS = 2_048  # read from the source for a check
DOCUMENTS, TOKENS = 4, 256  # of a check, and tokens of each
LONGEST = 2_048  # tokens of one document: attention windows and scaled RoPE show only far from its beginning
SOURCE_ROWS = 16  # tokenised at a time
# A teacher's codebook is fitted to one in 20 tokens of its domains, within these bounds.
CALIBRATION_SHARE, CALIBRATION_LEAST, CALIBRATION_MOST = 20, 2_048, 65_536


def documents_to_check(
    writer: Writer, config: BuildConfig, teacher_index: int, tokenizer: "PreTrainedTokenizerBase"
) -> list[NDArray[np.int32]]:
    """Return token ids of some documents of a teacher's first domain; empty if no token carries loss.

    They come from the cache where it has the domain's tokens, else from the source.
    """
    name = writer.manifest.domains_of(teacher_index)[0]
    if writer.state(name) is not None and writer.has_tokens(name):
        return tokenised_documents(writer, name)
    maker = DocumentMaker(name, config.domains[name], tokenizer, config.seed, config.seq_length)
    documents: list[NDArray[np.int32]] = []
    for document in _labelled_chunks(maker):
        documents.append(document)
        if sum(map(len, documents)) >= CHECK_TOKENS:
            break
    return excerpts(documents)


def tokenised_documents(writer: Writer, domain: str) -> list[NDArray[np.int32]]:
    """Return excerpts of a tokenised domain's documents; empty if none has a label."""
    count = layout.shards(writer.split_state(domain, "validation").rows, writer.manifest.shard_rows)
    shards = (requests(writer.read_tokens(domain, "validation", shard)).documents for shard in range(count))
    return excerpts(next(filter(None, shards), []))


def excerpts(documents: Sequence[NDArray[np.int32]]) -> list[NDArray[np.int32]]:
    """Return the longest document, and the beginnings of a few others."""
    if not documents:
        return []
    longest = max(range(len(documents)), key=lambda index: len(documents[index]))
    others = [*documents[:longest], *documents[longest + 1 :]]
    return [documents[longest][:LONGEST], *(document[:TOKENS] for document in others[: DOCUMENTS - 1])]


def _labelled_chunks(maker: DocumentMaker) -> Iterator[NDArray[np.int32]]:
    """Yield each document's first chunk with a label."""
    for part in sources.read(maker.name, maker.domain, skip=0):
        for first in range(0, len(part.table), SOURCE_ROWS):
            rows = sources.Part(part.first + first, part.table.slice(first, SOURCE_ROWS), part.replaced)
            for document in maker.tokenise(rows).documents:
                chunks = chunk_document(document, maker.seq_length)
                yield from [chunk.tokens for chunk in chunks if chunk.carries_loss[1:].any()][:1]


def calibration_rows(writer: Writer, name: str) -> dict[str, NDArray[Any]]:
    """Return some train rows of a tokenised domain, [n, S] each by name, evenly spaced in its first shards.

    A row longer than the sample is cut.
    """
    manifest = writer.manifest
    names = manifest.domains_of(manifest.domain(name).teacher_index)
    total = sum(writer.split_state(other, "train").tokens for other in names)
    budget = min(max(total // CALIBRATION_SHARE, CALIBRATION_LEAST), CALIBRATION_MOST)
    tokens = math.ceil(budget / len(names))
    row_count = math.ceil(tokens / manifest.seq_length)
    count = min(
        layout.shards(row_count, manifest.shard_rows),
        layout.shards(writer.split_state(name, "train").rows, manifest.shard_rows),
    )
    shards = [writer.read_tokens(name, "train", shard) for shard in range(count)]
    rows = {array: np.concatenate([shard[array] for shard in shards]) for array in shards[0]}
    chosen = np.unique(np.linspace(0, len(rows["tokens"]) - 1, row_count).astype(np.int64))
    width = min(manifest.seq_length, max(tokens, 2))
    rows = {
        array: values[chosen, : None if array == "teacher_prefix" else width]
        for array, values in rows.items()
    }
    rows["loss_mask"][:, -1] = 0  # the last position's label is outside
    return rows
