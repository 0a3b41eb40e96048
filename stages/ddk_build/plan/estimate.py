"""Estimate a build without running it: rows, tokens and bytes; with a probe, hours too."""

import time
from dataclasses import dataclass, replace
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ddk_build.build import answer
from ddk_build.config import BuildConfig
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.documents import IngestStatistics
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.holdout import SplitSettings, Splitter
from ddk_build.data.packing.packer import Row
from ddk_build.data.sources import count_rows
from ddk_build.data.written import with_columns
from ddk_build.manifest import describe
from ddk_build.teacher.engines import load_teacher
from ddk_build.teacher.tokenizer import load_tokenizer, vocabulary
from ddk_build.tokenize.ingest import domain_state
from ddk_build.tokenize.token_shards import TokenShards
from ddk_cache.cache.metadata import answer_arrays, split_arrays
from ddk_cache.cache.writer import open_writer
from ddk_cache.format import layout
from ddk_cache.format.commit_record import record_size
from ddk_cache.format.layout import ShardKey
from ddk_cache.format.shards import INDEX_ENTRY
from ddk_cache.storage.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE_TOKENS = 200_000  # of each domain, tokenised and packed
PROBE_ROWS = 4  # of each domain, answered by the teacher

# Measured on real caches: a 135M teacher with 49,152 tokens over code and prose. A larger vocabulary or a
# flatter teacher needs more bytes.
ENTRY_BYTES = 1.6  # an entry's id and log-probability
POSITION_BYTES = 7.0  # everything else at a position
WRITER_BYTES = 1.0  # a token's log-probability by its writer
LABEL_BYTES = 5.0  # a token in a validation split: its id and its label's log-probability
KEPT_BY_NUCLEUS = 0.55  # of the top k entries, if top_p is below 1
DISTINCT_BY_DRAW = 0.44  # distinct ids a draw


@dataclass(frozen=True)
class DomainEstimate:
    """The size of a domain, both splits together."""

    documents: int
    tokens: int
    """In the rows: with repeated context, without held-out text that has no room in validation."""
    train_rows: int
    validation_rows: int
    bytes: int
    at_least: bool
    """The end of a streamed source is not known: the sizes are those of its first part."""


@dataclass(frozen=True)
class Estimate:
    """The size and the time of a build."""

    domains: dict[str, DomainEstimate]
    target: layout.Target
    bytes_per_token: float
    tokens_per_second: float | None
    """The teacher's, on this machine; None without a probe."""

    def to_json(self) -> dict[str, Any]:
        """Return everything, with the totals."""
        totals = {
            key: sum(getattr(domain, key) for domain in self.domains.values())
            for key in DomainEstimate.__dataclass_fields__
        }
        totals["at_least"] = bool(totals["at_least"])
        hours = totals["tokens"] / self.tokens_per_second / 3600 if self.tokens_per_second else None
        return {
            "domains": {name: vars(domain) for name, domain in self.domains.items()},
            "total": totals,
            "target": self.target.model_dump(),
            "bytes_per_token": self.bytes_per_token,
            "tokens_per_second": self.tokens_per_second,
            "hours": hours,
        }


def estimate(config: BuildConfig, *, probe: bool) -> Estimate:
    """Tokenise and pack a sample of every domain, and extrapolate; the cache is not written.

    With ``probe``, the teacher answers a few rows, to measure bytes a token and tokens a second.

    Raises ConfigError if the configuration is wrong, or a source cannot be read.
    """
    config = with_columns(config)
    tokenizer = load_tokenizer(config.teacher)
    samples = {name: _sample(config, name, tokenizer) for name in config.domains}
    bytes_per_token, tokens_per_second = _typical_bytes(config.target), None
    if probe:
        rows = {name: sample.rows[:PROBE_ROWS] for name, sample in samples.items()}
        bytes_per_token, tokens_per_second = _probe(config, tokenizer, rows)
    manifest = describe(config, tokenizer)
    domains = {name: sample.extrapolate(manifest, name, bytes_per_token) for name, sample in samples.items()}
    return Estimate(domains, config.target, bytes_per_token, tokens_per_second)


@dataclass(frozen=True)
class _Sample:
    """The beginning of a domain, tokenised and packed."""

    documents: int
    rows: list[Row]
    validation_rows: int
    scale: float
    """The size of the domain, measured in samples."""
    at_least: bool

    def extrapolate(self, manifest: layout.Manifest, name: str, bytes_per_token: float) -> DomainEstimate:
        """Return the size of the whole domain."""
        # A sample has at least one validation row; the domain has at most those configured.
        validation = min(manifest.validation_rows, round(self.validation_rows * self.scale))
        train = max(1, round(len(self.rows) * self.scale - validation))
        tokens = sum(len(chunk) for row in self.rows for chunk in row) * self.scale
        stored = 0.0
        rows: dict[layout.SplitName, int] = {"train": train, "validation": validation}
        for split, count in rows.items():
            is_as_train = answer_arrays(manifest, split) == answer_arrays(manifest, "train")
            token_bytes = bytes_per_token if is_as_train else LABEL_BYTES
            token_bytes += WRITER_BYTES * manifest.domain(name).has_writer_logprob
            stored += tokens * count / (train + validation) * token_bytes
            stored += _fixed(manifest, name, split, count)
        return DomainEstimate(
            round(self.documents * self.scale), round(tokens), train, validation, round(stored), self.at_least
        )


def _sample(config: BuildConfig, name: str, tokenizer: "PreTrainedTokenizerBase") -> _Sample:
    domain = config.domains[name]
    limit = min(SAMPLE_TOKENS, domain.max_tokens or SAMPLE_TOKENS)
    statistics = IngestStatistics()
    limited = domain.model_copy(update={"max_tokens": limit})
    maker = DocumentMaker(name, limited, tokenizer, config.seed, config.seq_length)
    taken = list(maker.documents(statistics))
    tokens: float | None = statistics.tokens
    if not statistics.exhausted and limit != domain.max_tokens:
        row_count = count_rows(name, domain)
        by_rows = None if row_count is None else statistics.tokens * row_count / statistics.rows
        tokens = min(filter(None, (by_rows, domain.max_tokens)), default=None)
    scale = 1.0 if tokens is None else tokens / statistics.tokens
    settings = SplitSettings.of(config)
    settings = replace(settings, validation_rows=max(1, round(settings.validation_rows / scale)))
    splitter = Splitter(settings, statistics, DocumentIndex())
    rows, rest = splitter.add(taken), list(splitter.finish())
    validation = sum(split == "validation" for split, _ in rest)
    rows += [row for _, row in rest]
    return _Sample(statistics.documents, rows, validation, scale, tokens is None)


def _fixed(manifest: layout.Manifest, name: str, split: layout.SplitName, rows: int) -> int:
    """Return the bytes of a split's commit records and of index entries for rows that do not exist."""
    arrays, shard_rows = len(split_arrays(manifest, name, split)), manifest.rows_per_shard(rows)
    count = layout.shards(rows, manifest.shard_rows)
    records = sum(
        record_size(len(split_arrays(manifest, name, split, kind)), shard_rows) for kind in layout.KINDS
    )
    return count * records + (count * shard_rows - rows) * arrays * INDEX_ENTRY


def _typical_bytes(target: layout.Target) -> float:
    """Return the typical bytes of a train token."""
    if target.kind == "label":
        return LABEL_BYTES
    if target.kind == "sampled":
        return POSITION_BYTES + ENTRY_BYTES * DISTINCT_BY_DRAW * target.samples
    kept = KEPT_BY_NUCLEUS if target.top_p < 1 else 1.0
    return POSITION_BYTES + ENTRY_BYTES * kept * target.top_k


def _probe(
    config: BuildConfig, tokenizer: "PreTrainedTokenizerBase", rows: dict[str, list[Row]]
) -> tuple[float, float]:
    """Build a cache of these rows in a temporary folder; return its bytes a token and tokens a second."""
    sampled = config.model_copy(update={"shard_tokens": PROBE_ROWS * config.seq_length})
    manifest = describe(sampled, tokenizer)
    tokens, seconds = 0, 0.0
    with TemporaryDirectory() as folder, open_writer(folder, manifest, vocabulary(tokenizer)) as writer:
        for name, domain_rows in rows.items():
            with TokenShards(writer, name) as shards:
                shards.add("train", domain_rows)
                shards.flush()
            writer.set_state(name, domain_state(shards, IngestStatistics(), (None,)))
        for index in range(len(manifest.teachers)):
            work: list[ShardKey] = [ShardKey(name, "train", 0) for name in manifest.domains_of(index)]
            if not work:  # a teacher of the cache, whose domains are not configured
                continue
            teacher = load_teacher(config.teacher_of(work[0][0]), config.target, config.teacher_length)
            answer(writer, teacher, index, work)  # the engine warms up
            began = time.perf_counter()
            answer(writer, teacher, index, work)
            seconds += time.perf_counter() - began
            tokens += sum(map(writer.tokens, work))
            if index + 1 < len(manifest.teachers):
                teacher.close()
        sizes = Storage(folder).sizes("")
    stored = sum(
        sizes[layout.ShardKey(name, "train", 0).object(array)]
        for name in rows
        for array in split_arrays(manifest, name, "train")
    )
    return stored / tokens, tokens / seconds


def as_text(estimate: dict[str, Any]) -> str:
    """Format the result of ``Estimate.to_json`` as a table."""
    lines = [f"{'domain':<24} {'documents':>12} {'tokens':>16} {'rows':>12} {'validation':>10} {'bytes':>18}"]
    for name, part in [*estimate["domains"].items(), ("all", estimate["total"])]:
        lines.append(
            f"{name:<24} {part['documents']:>12,} {part['tokens']:>16,} {part['train_rows']:>12,} "
            f"{part['validation_rows']:>10,} {part['bytes']:>18,}" + (" at least" if part["at_least"] else "")
        )
    if estimate["total"]["at_least"]:
        lines.append("at least: the source is a stream without max_tokens; its end is not known")
    lines.append(f"about {estimate['bytes_per_token']:.0f} bytes a train token")
    if estimate["target"]["kind"] == "sampled":
        lines += _draw_limit(estimate["domains"])
    if estimate["hours"] is None:
        lines.append("typical sizes; --probe measures them, and the time, on the teacher itself")
    else:
        hours = estimate["hours"]
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        lines.append(f"{estimate['tokens_per_second']:,.0f} tokens/s here: {time}")
    return "\n".join(lines)


def _draw_limit(domains: dict[str, Any]) -> list[str]:
    """Return a line on the limit of training passes over draws, for the smallest domain of known size."""
    tokens = {
        name: round(part["tokens"] * part["train_rows"] / (part["train_rows"] + part["validation_rows"]))
        for name, part in domains.items()
        if not part["at_least"]
    }
    if not tokens:
        return []
    name, least = min(tokens.items(), key=lambda item: item[1])
    passes = layout.EPOCHS_OF_DRAWS
    return [
        f"draws are good for {passes} passes over a domain, {passes * least:,} tokens of training in {name}; "
        "after that the student begins to learn their noise (docs/choosing.md)"
    ]
