"""What lies where in a cache: the manifest, the arrays' names, types, chunks and shards, the version.

docs/format.md says the same in prose, for readers in other languages.
"""

import json
import math
import re
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, StringConstraints, model_validator

from ddk_cache.configuration import Config

FORMAT = "ddk-cache"
FORMAT_VERSION = 2  # of new caches; version 1 is read too
MANIFEST_KEY = "ddk_cache"  # the attribute of a zarr group that holds the manifest or a domain's state
CODEBOOK = "ddk.codebook"  # these have a dot, which no domain's name may have
VOCABULARY = "ddk.vocabulary"

MOST_TEACHERS = 64
MOST_DOMAINS = 1024
MOST_SHARDS = 1 << 20  # of a split
MOST_SHARD_TOKENS = 1 << 28  # where a shard has more than one row
MOST_ENTRIES = 1 << 26  # of a row; decoded they take 8 bytes each
MOST_TABLE_BYTES = 1 << 27
TOKEN_MARKERS, MARKERS = "token_markers", "markers"  # arrays that vouch for a shard's tokens; for all of it
TOKEN_SEALS = "token_seals"  # the list of a split's token markers

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Count = Annotated[int, Field(ge=0, lt=1 << 53)]


class Target(Config):
    """What is kept of the teacher's distribution at each position."""

    kind: Literal["topk", "sampled", "label"] = Field(
        "topk", description="topk: the best entries; sampled: draws; label: log p(label) alone"
    )
    top_k: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="topk: entries kept a token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="topk: keep those in this nucleus")
    samples: Annotated[int, Field(ge=1, le=4096)] = Field(24, description="sampled: draws a token")
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(1.0, description="softmax(logits / this)")

    @property
    def width(self) -> int:
        """The most entries a position can have (E of every shape)."""
        return {"topk": self.top_k, "sampled": self.samples, "label": 0}[self.kind]


# Passes over the same draws after which training and ``estimate`` speak of their noise; docs/targets.md.
EPOCHS_OF_DRAWS = 4


class TeacherInfo(Config):
    """Which teacher spoke, and through which engine."""

    model: str = Field(max_length=4096)
    revision: str | None = Field(max_length=4096)
    dtype: str = Field(max_length=32)
    engine: str = Field(max_length=64)
    engine_version: str = Field(max_length=128)
    weights: str | None = Field(
        None, max_length=128, description="commit:<sha> or sha256:<digest of the files>"
    )
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="all but those that are about speed alone"
    )


class DomainSource(Config):
    """A domain's name and where its text comes from, as the build's configuration has it."""

    name: DomainName
    source: dict[str, Any]
    max_tokens: int | None
    teacher: int = Field(0, ge=0, lt=MOST_TEACHERS, description="its number in the manifest's teachers")
    splits: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="DomainState.splits; null until it is finished"
    )


class Manifest(Config):
    """The root's attributes: all that a reader must know before it opens an array."""

    format: Literal["ddk-cache"]
    version: Literal[1, 2]
    teachers: tuple[TeacherInfo, ...] = Field(min_length=1, max_length=MOST_TEACHERS)
    tokenizer_hash: str = Field(pattern=r"^[0-9a-f]{64}$")
    vocab_size: int = Field(ge=1, le=1 << 24)
    target: Target
    seq_length: int = Field(ge=2, le=1 << 20)
    shard_rows: int = Field(ge=1, le=1 << 20)
    validation_rows: int = Field(ge=1, le=1 << 30)
    seed: int = Field(ge=0, lt=1 << 64)
    validation_targets: bool = Field(False, description="the validation split keeps targets too")
    overlap: int = Field(
        0, ge=0, lt=1 << 20, description="tokens of context in front of a cut piece, without loss"
    )
    domains: tuple[DomainSource, ...] = Field(min_length=1, max_length=MOST_DOMAINS)

    @model_validator(mode="after")
    def _fits_together(self) -> "Manifest":
        names = [domain.name for domain in self.domains]
        if len(set(names)) < len(names):
            raise ValueError("two domains have the same name")
        if any(domain.teacher >= len(self.teachers) for domain in self.domains):
            raise ValueError("a domain's teacher is not among the teachers")
        if self.seq_length * self.target.width > MOST_ENTRIES:
            raise ValueError(f"seq_length x entries a token must be at most {MOST_ENTRIES:,}")
        if self.shard_rows > 1 and self.shard_rows * self.seq_length > MOST_SHARD_TOKENS:
            raise ValueError(f"a shard of several rows must have at most {MOST_SHARD_TOKENS:,} tokens")
        return self

    def has_targets(self, split: SplitName) -> bool:
        """Whether the split keeps entries, not only the labels' log-probabilities."""
        return self.target.kind != "label" and (split == "train" or self.validation_targets)

    def domain(self, name: str) -> DomainSource:
        return next(domain for domain in self.domains if domain.name == name)

    def domains_of(self, teacher: int) -> list[str]:
        """Names of the domains that a teacher answers."""
        return [domain.name for domain in self.domains if domain.teacher == teacher]

    def teacher_of(self, domain: str) -> TeacherInfo:
        return self.teachers[self.domain(domain).teacher]

    @cached_property
    def identity(self) -> str:
        """sha256 of what never changes in a cache."""
        return digest(self.model_dump(mode="json", exclude={"teachers", "validation_rows", "domains"}))

    def binding(self, domain: str) -> str:
        """sha256 of what a domain's bytes depend on, so that no other domain's or cache's pass for them."""
        source = self.domain(domain)
        teacher = self.teachers[source.teacher].model_dump(mode="json", exclude={"engine_version"})
        return digest({"cache": self.identity, "domain": domain, "source": source.source, "teacher": teacher})


class SplitState(Config):
    """One split after tokenising: known before the teacher says a word."""

    rows: int = Field(ge=0, lt=1 << 40)
    tokens: Count = Field(description="all but padding")
    labels: Count = Field(description="positions that carry loss")
    token_seals: str | None = Field(
        None, pattern=r"^[0-9a-f]{64}$", description="sha256 of the list; null in caches from before it"
    )


class DomainState(Config):
    """A domain group's attributes; absent until the domain's tokens are written."""

    train: SplitState
    validation: SplitState
    limits: tuple[int | None, ...] = Field(
        min_length=1, description="each max_tokens that the source was read up to, oldest first"
    )
    exhausted: bool = Field(description="the source ended before the last limit was reached")
    source_rows: Count = Field(description="rows of the dataset that were read")
    source_tokens: Count = Field(description="tokens taken, which max_tokens limits")
    documents: Count = Field(description="documents taken, both splits")
    skipped: dict[str, Count] = Field(description="documents left out, by reason")
    left_over: Count = Field(description="tokens of held-out documents beyond the validation rows")
    held_out: int | None = Field(ge=0, lt=1 << 64, description="largest digest among validation documents")
    complete: bool = Field(default=False, description="every shard has its marker")
    teacher_cross_entropy: float | None = Field(
        default=None,
        ge=0,
        le=700,
        allow_inf_nan=False,
        description="nats a label; null without all of validation",
    )

    def split(self, name: SplitName) -> SplitState:
        return self.train if name == "train" else self.validation

    @property
    def splits(self) -> str | None:
        """sha256 of both splits' counts and lists; None in caches from before there were lists."""
        found = [self.split(name) for name in SPLITS]
        if any(split.token_seals is None for split in found):
            return None
        return digest({name: split.model_dump() for name, split in zip(SPLITS, found, strict=True)})


class Table(Config):
    """One of the codebook's tables, of one or two dimensions: zarr shape [rows, width], all in one shard."""

    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64", "float32"]
    shape: tuple[Annotated[int, Field(ge=1, le=1 << 24)], ...] = Field(min_length=1, max_length=2)
    sha256: str | None = Field(None, pattern=r"^[0-9a-f]{64}$", description="of its values, row after row")
    checksum: int | None = Field(None, ge=0, lt=1 << 32, description="version 1: crc32c of its object")

    @model_validator(mode="after")
    def _is_bounded(self) -> "Table":
        if math.prod(self.shape) * np.dtype(self.dtype).itemsize > MOST_TABLE_BYTES:
            raise ValueError(f"a table must have at most {MOST_TABLE_BYTES:,} bytes")
        return self


@dataclass(frozen=True)
class RowArray:
    """One of a split's arrays: zarr shape [rows, width], one row a chunk, ``shard_rows`` rows a shard."""

    dtype: str
    width: int
    compressor: Literal["pcodec", "zstd"]
    page: int = 1 << 18  # pcodec: numbers that share one table of frequencies

    @property
    def numpy_dtype(self) -> np.dtype[Any]:
        return np.dtype(self.dtype)


def token_arrays(seq_length: int) -> dict[str, RowArray]:
    """What tokenising writes, by name."""
    return {
        "tokens": RowArray("uint32", seq_length, "pcodec"),
        "segments": RowArray("uint16", seq_length, "pcodec"),
        "loss_mask": RowArray("uint8", seq_length, "zstd"),
    }


def label_array(seq_length: int) -> dict[str, RowArray]:
    """What the teacher says of the true labels, exact; 0 where a position has none."""
    return {"label_logprob": RowArray("float32", seq_length, "pcodec")}


def canonical(content: Any) -> bytes:
    """JSON in the one way that digests are made of: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(content: Any) -> str:
    """sha256 of the canonical JSON, in hexadecimal."""
    return sha256(canonical(content)).hexdigest()


def shards(rows: int, shard_rows: int) -> int:
    """How many shards ``rows`` rows make."""
    return -(-rows // shard_rows)


def shard_key(domain: str, split: SplitName, array: str, shard: int) -> str:
    """The object that holds a shard of an array (zarr's default chunk key)."""
    return f"{domain}/{split}/{array}/c/{shard}/0"


def table_name(name: str) -> str:
    """The name, if it is one that a table may have.

    Raises
    ------
    ValueError
        It could lead elsewhere.
    """
    if not re.fullmatch("[a-z_]{1,64}", name):
        raise ValueError("no table has such a name")
    return name


def own_key(domain: str, name: str) -> str:
    """Where a build keeps what is its own of a domain, no part of the cache."""
    return f"{domain}/ddk.{name}"


def codebook_groups(teacher: int) -> tuple[str, str]:
    """Where a teacher's codebook is kept, and its second copy."""
    return f"{CODEBOOK}-{teacher}" if teacher else CODEBOOK, f"{CODEBOOK}-{teacher}-copy"


def marker_prefix(domain: str, split: SplitName, kind: str = MARKERS) -> str:
    return f"{domain}/{split}/{kind}/c/"


def marker_key(domain: str, split: SplitName, shard: int, kind: str = MARKERS) -> str:
    """The object that vouches for a shard; written last."""
    return f"{marker_prefix(domain, split, kind)}{shard}/0"


def seals_key(domain: str, split: SplitName) -> str:
    """The object that lists the seals of a split's token markers."""
    return f"{domain}/{split}/{TOKEN_SEALS}/c/0/0"
