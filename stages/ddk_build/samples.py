"""What a teacher reads beforehand for the codec's tables: some documents of each of its domains.

They are taken from the source and kept with the cache before anything is tokenised, so the tables are the
same whichever domains have their tokens by then.
"""

import math
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build import sources
from ddk_build.config import BuildConfig
from ddk_build.corpus import Maker
from ddk_build.documents import Columns, Document, from_columns, to_columns
from ddk_build.kept import pack_arrays, unpack_arrays
from ddk_build.pieces import pieces
from ddk_cache.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE, BINDING = "sample", "binding"  # what it is kept as, and in it the domain's
# Least and most tokens of a teacher's domains together; of rows, one in so many, where they suffice.
LEAST, MOST, STRIDE = 2_048, 65_536, 20


def keep_sample(writer: Writer, config: BuildConfig, name: str, tokenizer: "PreTrainedTokenizerBase") -> None:
    """See that a domain's sample is kept: a twentieth of its rows, from the first on, as far as is needed."""
    if _kept(writer, name) is not None:
        return
    manifest = writer.manifest
    own = manifest.domains_of(manifest.domain(name).teacher_index)
    limits = [config.domains[one].max_tokens for one in own]
    whole = sum(sys.maxsize if limit is None else limit for limit in limits)
    most = math.ceil(min(max(whole // STRIDE, LEAST), MOST) / len(own))
    least = math.ceil(LEAST / len(own))
    domain = config.domains[name]
    make = Maker(name, domain, tokenizer, config.seed, config.seq_length)
    found = _pieces(make, STRIDE, most, config.context)
    if sum(map(len, found)) < least:
        found = _pieces(make, 1, least, config.context)
    write_sample(writer, name, found)


def write_sample(writer: Writer, name: str, documents: Sequence[Document]) -> None:
    """Keep these as a domain's sample."""
    writer.write_blob(name, SAMPLE, pack_arrays(to_columns(documents) | {BINDING: _binding(writer, name)}))


def read_sample(writer: Writer, name: str) -> list[Document]:
    """A domain's sample: pieces of documents, a row long at most; none where none was kept."""
    columns = _kept(writer, name)
    return [] if columns is None else from_columns(columns)


def _kept(writer: Writer, name: str) -> Columns | None:
    """A sample of this domain; None where it is another's, as of a build that failed with another teacher."""
    columns = unpack_arrays(writer.read_blob(name, SAMPLE))
    if columns is None or not np.array_equal(columns.pop(BINDING, []), _binding(writer, name)):
        return None
    return columns


def _binding(writer: Writer, name: str) -> NDArray[np.uint8]:
    return np.frombuffer(bytes.fromhex(writer.manifest.fingerprint(name)), np.uint8)


def _pieces(make: Maker, stride: int, most: int, overlap: int) -> list[Document]:
    """The first piece with a label of each document of every ``stride``-th row, about ``most`` tokens."""
    found: list[Document] = []
    room = most
    for part in sources.read(make.name, make.domain, skip=0):
        for at in range(-part.first % stride, len(part.table), stride):
            row = sources.Part(part.first + at, part.table.slice(at, 1), part.replaced)
            for document in from_columns(make.documents(row).columns):
                labelled = (p for p in pieces(document, make.seq_length, overlap) if p.counts[1:].any())
                if (piece := next(labelled, None)) is not None:
                    found.append(piece[:room] if piece.counts[1:room].any() else piece)
                    room -= len(found[-1])
                if room < 1:
                    return found
    return found
