"""The layout of a cache on disk: manifest, domain states, array shapes and object keys.

docs/format.md describes the same for readers in other languages.
"""

import json
import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from hashlib import sha256
from typing import Annotated, Any, Final, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, StringConstraints, model_validator

from ddk_cache.util.configuration import Config

FORMAT = "ddk-cache"
FORMAT_VERSION = 3
ATTRIBUTE = "ddk_cache"  # the attribute of a zarr group that holds the manifest or a domain's state
CODEBOOK = "ddk.codebook"  # a domain's name has no dot, so it never collides with these
VOCABULARY = "ddk.vocabulary"

# Bounds on the memory and time that a cache from a stranger can cost.
MOST_DOMAINS = 1024
MOST_SHARDS = 1 << 20  # of a split
MOST_SHARD_ROWS = 1 << 20
MOST_SHARD_TOKENS = 1 << 28  # where a shard has more than one row
MOST_ENTRIES = 1 << 26  # of a row; decoded they take 8 bytes each
MOST_TABLE_BYTES = 1 << 27

PREFIX_ROWS = 4  # rows of tokens that the teacher may read in front of a row's documents

TOKEN_COMMITS: Final = "token_commits"  # the array of commit records over the tokens of each shard
COMMITS: Final = "commits"  # the array of commit records over all arrays of each shard

SplitName = Literal["train", "validation"]
SPLITS: tuple[SplitName, SplitName] = ("train", "validation")
Kind = Literal["token_commits", "commits"]
KINDS: tuple[Kind, Kind] = (TOKEN_COMMITS, COMMITS)

DomainName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_-]{1,64}$")]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
BuildId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]


class ShardKey(NamedTuple):
    """Names one shard of one split of one domain."""

    domain: str
    split: SplitName
    shard: int

    def __str__(self) -> str:
        return f"{self.domain}/{self.split} shard {self.shard}"

    def object(self, array: str) -> str:
        """Return the key of the object that holds this shard of an array: zarr's default chunk key."""
        return f"{self.domain}/{self.split}/{array}/c/{self.shard}/0"


class Target(Config):
    """The part of the teacher's distribution that is stored at each position."""

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

    @property
    def summary(self) -> str:
        """The target as text, such as "top 64"."""
        nucleus = f" inside the {self.top_p} nucleus" if self.top_p < 1 else ""
        return {
            "topk": f"top {self.top_k}{nucleus}",
            "sampled": f"{self.samples} systematic draws",
            "label": "the labels alone",
        }[self.kind]


# Passes over the same draws after which training and ``estimate`` warn of their noise; docs/choosing.md.
EPOCHS_OF_DRAWS = 4


class TeacherInfo(Config):
    """The model that answered, and the engine that ran it."""

    model: str
    revision: str | None
    dtype: str
    engine: str
    engine_version: str
    weights: str | None = Field(None, description="commit:<sha> or sha256:<digest of the files>")
    engine_args: dict[str, Any] = Field(
        default_factory=dict, description="without those that only affect speed"
    )

    @property
    def settings(self) -> dict[str, Any]:
        """Everything that determines its answers, as JSON values."""
        return self.model_dump(mode="json", exclude={"engine_version"})


class DomainSource(Config):
    """A domain's name and what decides its documents: the configuration's keys, the tokenizer's digest."""

    name: DomainName
    source: dict[str, Any]
    max_tokens: int | None
    teacher_index: NonNegativeInt = Field(0, description="into the manifest's teachers")
    build_id: BuildId = Field(
        default_factory=partial(secrets.token_hex, 16),
        description="random; kept when the domain is resumed or extended",
    )

    @property
    def has_writer_logprob(self) -> bool:
        """Whether the source has its writer's log-probabilities, which the cache then keeps."""
        return "logprobs_column" in self.source

    @property
    def has_teacher_prefix(self) -> bool:
        """Whether the teacher reads something in front of the documents, which the cache then keeps."""
        return "teacher_prefix_column" in self.source


class Manifest(Config):
    """The attributes of the root group."""

    format: Literal["ddk-cache"]
    version: Literal[3]
    teachers: tuple[TeacherInfo, ...] = Field(min_length=1, max_length=MOST_DOMAINS)
    tokenizer_hash: Digest
    vocab_size: PositiveInt
    target: Target
    seq_length: int = Field(ge=2, le=MOST_ENTRIES)
    shard_rows: int = Field(ge=1, le=MOST_SHARD_ROWS)
    validation_rows: PositiveInt
    seed: NonNegativeInt
    validation_targets: bool = Field(False, description="the validation split keeps targets too")
    overlap: NonNegativeInt = Field(
        0, description="tokens of context, without loss, at the start of a chunk of a document"
    )
    domains: tuple[DomainSource, ...] = Field(min_length=1, max_length=MOST_DOMAINS)

    @model_validator(mode="after")
    def _is_consistent(self) -> "Manifest":
        names = [domain.name for domain in self.domains]
        if len(set(names)) < len(names):
            raise ValueError("two domains have the same name")
        if any(domain.teacher_index >= len(self.teachers) for domain in self.domains):
            raise ValueError("a domain's teacher_index is not among the teachers")
        if self.seq_length * max(1, self.target.width) > MOST_ENTRIES:
            raise ValueError(f"seq_length x entries a token must be at most {MOST_ENTRIES:,}")
        if self.shard_rows > 1 and self.shard_rows * self.seq_length > MOST_SHARD_TOKENS:
            raise ValueError(f"a shard of several rows must have at most {MOST_SHARD_TOKENS:,} tokens")
        return self

    def has_targets(self, split: SplitName) -> bool:
        """Return whether the split keeps entries, not only the log-probabilities of the labels."""
        return self.target.kind != "label" and (split == "train" or self.validation_targets)

    def domain(self, name: str) -> DomainSource:
        """Return the domain of that name."""
        return next(domain for domain in self.domains if domain.name == name)

    def domains_of(self, teacher_index: int) -> list[str]:
        """Return the names of the domains that a teacher answers."""
        return [domain.name for domain in self.domains if domain.teacher_index == teacher_index]

    def teacher_of(self, domain: str) -> TeacherInfo:
        """Return the teacher that answers a domain."""
        return self.teachers[self.domain(domain).teacher_index]

    def token_arrays(self, domain: str) -> dict[str, "RowArray"]:
        """Return the arrays of a domain that tokenising writes, by name."""
        source = self.domain(domain)
        return token_arrays(
            self.seq_length,
            writer_logprob=source.has_writer_logprob,
            teacher_prefix=source.has_teacher_prefix,
        )

    def rows_per_shard(self, rows: int) -> int:
        """Return the capacity, in rows, of each shard of a split of ``rows`` rows.

        A split that fits into one shard has a shard of its size: an unused row costs 16 bytes per array.
        """
        return max(1, min(rows, self.shard_rows))

    @cached_property
    def identity(self) -> str:
        """sha256 of the part of a manifest that never changes."""
        return digest(self.model_dump(mode="json", exclude={"teachers", "validation_rows", "domains"}))

    def fingerprint(self, domain: str) -> str:
        """Return the sha256 of everything that determines a domain's bytes, and of its build id.

        State and commit records carry it, so those of another domain, cache or build are refused.
        """
        source = self.domain(domain)
        return digest(
            {
                "cache": self.identity,
                "domain": domain,
                "build_id": source.build_id,
                "source": source.source,
                "teacher": self.teachers[source.teacher_index].settings,
            }
        )


class SplitState(Config):
    """The size of one split, known once it is tokenised."""

    rows: NonNegativeInt = 0
    tokens: NonNegativeInt = Field(0, description="without padding")
    labels: NonNegativeInt = Field(0, description="positions that carry loss")

    def plus(self, rows: Mapping[str, NDArray[Any]]) -> "SplitState":
        """Return the size with these rows, [n, S] each by name."""
        return SplitState(
            rows=self.rows + len(rows["tokens"]),
            tokens=self.tokens + int(np.count_nonzero(rows["segments"])),
            labels=self.labels + int(np.count_nonzero(rows["loss_mask"])),
        )


class DomainState(Config):
    """A domain group's attributes; absent until the domain's tokens are written."""

    train: SplitState
    validation: SplitState
    limits: tuple[int | None, ...] = Field(
        min_length=1, description="each max_tokens that the source was read up to, oldest first"
    )
    exhausted: bool = Field(description="the source ended before the last limit was reached")
    source_rows: NonNegativeInt = Field(description="rows of the dataset that were read")
    source_tokens: NonNegativeInt = Field(description="tokens taken, which max_tokens limits")
    documents: NonNegativeInt = Field(description="documents taken, both splits")
    skipped: dict[str, NonNegativeInt] = Field(description="documents left out, by reason")
    left_over: NonNegativeInt = Field(description="tokens of held-out documents beyond the validation rows")
    complete: bool = Field(default=False, description="every shard has its commit record")
    teacher_cross_entropy: float | None = Field(
        default=None,
        ge=0,
        le=700,  # exp of more overflows
        description="nats a label; null until the validation split is answered",
    )

    def split(self, name: SplitName) -> SplitState:
        """Return one of the two splits."""
        return self.train if name == "train" else self.validation


class Table(Config):
    """One table of a codebook: zarr shape [rows, width], all in one shard."""

    dtype: Literal["uint8", "uint16", "uint32", "int32", "int64", "float32"]
    shape: tuple[PositiveInt, ...] = Field(min_length=1, max_length=2)
    sha256: Digest = Field(description="of its values, row after row")

    @model_validator(mode="after")
    def _is_bounded(self) -> "Table":
        if math.prod(self.shape) * np.dtype(self.dtype).itemsize > MOST_TABLE_BYTES:
            raise ValueError(f"a table must have at most {MOST_TABLE_BYTES:,} bytes")
        return self


@dataclass(frozen=True)
class RowArray:
    """One of a split's arrays: zarr shape [rows, width], one row a chunk."""

    dtype: str
    width: int
    compressor: Literal["pcodec", "zstd"]
    page: int = 1 << 18  # pcodec: numbers that share one table of frequencies


def token_arrays(
    seq_length: int, *, writer_logprob: bool = False, teacher_prefix: bool = False
) -> dict[str, RowArray]:
    """Return the arrays that tokenising writes, by name."""
    arrays = {
        "tokens": RowArray("uint32", seq_length, "pcodec"),
        "segments": RowArray("uint16", seq_length, "pcodec"),
        "loss_mask": RowArray("uint8", seq_length, "zstd"),
    }
    if writer_logprob:
        arrays["writer_logprob"] = RowArray("uint16", seq_length, "pcodec")
    if teacher_prefix:
        arrays["teacher_prefix"] = RowArray("uint32", PREFIX_ROWS * seq_length, "pcodec")
    return arrays


def canonical(content: Any) -> bytes:
    """Return canonical JSON, from which digests are made: sorted keys, no spaces, ASCII."""
    return json.dumps(content, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def digest(content: Any) -> str:
    """Return the sha256 of the canonical JSON, in hexadecimal."""
    return sha256(canonical(content)).hexdigest()


def shards(rows: int, shard_rows: int) -> int:
    """Return the number of shards of ``rows`` rows."""
    return -(-rows // shard_rows)


def rows_in(total: int, shard: int, shard_rows: int) -> int:
    """Return the rows of one shard of a split of ``total`` rows; 0 beyond its end."""
    return max(0, min(shard_rows, total - shard * shard_rows))


def blob_key(domain: str, name: str) -> str:
    """Return the key of a blob of the build, which is not part of the cache."""
    return f"{domain}/ddk.{name}"


def codebook_groups(teacher_index: int) -> tuple[str, str]:
    """Return the groups of a teacher's codebook and of its second copy."""
    return f"{CODEBOOK}-{teacher_index}" if teacher_index else CODEBOOK, f"{CODEBOOK}-{teacher_index}-copy"
