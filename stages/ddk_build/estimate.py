"""What a build will hold and cost, before anything is spent: rows, tokens, bytes; after a probe, hours."""

import time
from collections import Counter
from dataclasses import dataclass
from tempfile import TemporaryDirectory
from typing import Any

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.corpus import documents
from ddk_build.documents import Intake
from ddk_build.domain_reading import domain_state
from ddk_build.domain_rows import DomainRows
from ddk_build.holdout import Splitting, split_rows
from ddk_build.manifest import describe
from ddk_build.packing import Row
from ddk_build.pipeline import Pipeline, Place, needs_codebook
from ddk_build.sources import count_rows
from ddk_build.teacher import load_teacher
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache import layout, markers
from ddk_cache.records import split_arrays
from ddk_cache.shards import INDEX_ENTRY
from ddk_cache.storage import Storage
from ddk_cache.tokens import Vocabulary
from ddk_cache.writer import open_writer

SAMPLE_TOKENS = 200_000  # of each domain, tokenised and packed
PROBE_ROWS = 4  # of each domain, read by the teacher

# Bytes of an entry's id and log-probability, and of everything else at a position, as real caches have them:
# a 135M teacher with 49,152 tokens over code and prose. A larger vocabulary or a flatter teacher needs more.
ENTRY_BYTES = 1.6
POSITION_BYTES = 7.0
LABEL_BYTES = 5.0  # of a token in a validation split: itself and its label's log-probability
KEPT_BY_NUCLEUS = 0.55  # of the top k entries, where top_p is below 1
DISTINCT_BY_DRAW = 0.44  # distinct ids a draw


@dataclass(frozen=True)
class DomainEstimate:
    """What a domain will come to. Sizes are for both splits together."""

    documents: int
    tokens: int
    """In the rows, context that is repeated included; held-out text without room in validation is not."""
    train_rows: int
    validation_rows: int
    bytes: int
    at_least: bool
    """The source is a stream whose end is not known: these are the numbers of its first part alone."""


@dataclass(frozen=True)
class Estimate:
    """The whole build."""

    domains: dict[str, DomainEstimate]
    target: layout.Target
    bytes_per_token: float
    tokens_per_second: float | None
    """The teacher's, on this machine; None without a probe."""

    def to_json(self) -> dict[str, Any]:
        """Everything, with the totals."""
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
    """Tokenise and pack a sample of every domain, and extrapolate; nothing is written.

    ``probe`` also lets the teacher read a few rows, for bytes a token and tokens a second.

    Raises
    ------
    ConfigError
        The configuration is wrong, or a source cannot be read.
    """
    tokenizer = load_tokenizer(config.teacher)
    samples: dict[str, list[Row]] = {}
    counts: dict[str, _Counts] = {}
    for name, domain in config.domains.items():
        samples[name], counts[name] = _sample(config, name, domain, tokenizer)
    words = vocabulary(tokenizer)
    per_token, speed = _probe(config, words, samples) if probe else (_typical_bytes(config.target), None)
    manifest = describe(config, words)
    domains = {name: _domain(counts[name], per_token, manifest) for name in config.domains}
    return Estimate(domains, config.target, per_token, speed)


@dataclass(frozen=True)
class _Counts:
    """Of a domain, found or extrapolated."""

    documents: int
    tokens: float
    train_rows: float
    validation_rows: int
    at_least: bool


def _sample(
    config: BuildConfig, name: str, domain: DomainConfig, tokenizer: Any
) -> tuple[list[Row], _Counts]:
    """PROBE_ROWS rows, and what the whole domain comes to."""
    limit = min(SAMPLE_TOKENS, domain.max_tokens or SAMPLE_TOKENS)
    intake = Intake()
    limited = domain.model_copy(update={"max_tokens": limit})
    taken = list(
        documents(name, limited, tokenizer, seed=config.seed, intake=intake, seq_length=config.seq_length)
    )
    scale, at_least = 1.0, False
    if not intake.exhausted and limit != domain.max_tokens:
        rows = count_rows(name, domain)
        whole = float("inf") if rows is None else intake.tokens * rows / intake.rows
        tokens = min(whole, domain.max_tokens or float("inf"))
        at_least = tokens == float("inf")
        scale = 1.0 if at_least else tokens / intake.tokens
    how = Splitting(
        seq_length=config.seq_length,
        validation_rows=max(1, round(config.validation_rows / scale)),
        overlap=config.context,
    )
    found = list(split_rows(taken, how, intake))
    counted = Counter(split for split, _ in found)
    stored = sum(len(piece) for _, row in found for piece in row)
    # A sample has at least one validation row; the domain never more than were asked for.
    validation = min(config.validation_rows, round(counted["validation"] * scale))
    train = sum(counted.values()) * scale - validation
    return [row for _, row in found[:PROBE_ROWS]], _Counts(
        round(intake.documents * scale), stored * scale, train, validation, at_least
    )


def _domain(counts: _Counts, per_token: float, manifest: layout.Manifest) -> DomainEstimate:
    rows = {"train": max(1, round(counts.train_rows)), "validation": counts.validation_rows}
    stored = 0.0
    for split in layout.SPLITS:
        is_as_train = split_arrays(manifest, split) == split_arrays(manifest, "train")
        tokens = counts.tokens * rows[split] / sum(rows.values())
        stored += tokens * (per_token if is_as_train else LABEL_BYTES) + _fixed(manifest, split, rows[split])
    return DomainEstimate(
        counts.documents,
        round(counts.tokens),
        rows["train"],
        rows["validation"],
        round(stored),
        counts.at_least,
    )


def _fixed(manifest: layout.Manifest, split: layout.Split, rows: int) -> int:
    """Bytes of a split's markers, and of its shards' indices over rows that the last one lacks."""
    arrays = len(split_arrays(manifest, split))
    count = layout.shards(rows, manifest.shard_rows)
    kinds = (arrays, len(layout.token_arrays(manifest.seq_length)))
    missing = count * manifest.shard_rows - rows
    return count * sum(markers.size(n, manifest.shard_rows) for n in kinds) + missing * arrays * INDEX_ENTRY


def _typical_bytes(target: layout.Target) -> float:
    if target.kind == "label":
        return LABEL_BYTES
    if target.kind == "sampled":
        return POSITION_BYTES + ENTRY_BYTES * DISTINCT_BY_DRAW * target.samples
    kept = KEPT_BY_NUCLEUS if target.top_p < 1 else 1.0
    return POSITION_BYTES + ENTRY_BYTES * kept * target.top_k


def _probe(config: BuildConfig, words: Vocabulary, samples: dict[str, list[Row]]) -> tuple[float, float]:
    """Bytes a token and tokens a second of a build of these rows, in a folder of its own."""
    manifest = describe(config.model_copy(update={"shard_tokens": PROBE_ROWS * config.seq_length}), words)
    tokens, seconds = 0, 0.0
    with TemporaryDirectory() as folder, open_writer(folder, manifest, words) as writer:
        for name, some in samples.items():
            with DomainRows(writer, name) as rows:
                rows.add("train", some)
                rows.flush()
            writer.set_state(name, domain_state(rows, Intake(), (None,)))
        for number in range(len(manifest.teachers)):
            places: list[Place] = [(name, "train", 0) for name in manifest.domains_of(number)]
            own = config.teacher_of(places[0][0])
            teacher = load_teacher(own, config.target, config.seq_length)
            with Pipeline(writer, teacher, number) as pipeline:
                if needs_codebook(writer, number):
                    pipeline.calibrate()
                for _ in range(2):  # the first time pays for warming up
                    began = time.perf_counter()
                    for place in places:
                        pipeline.take(place)
                    pipeline.finish()
                    last = time.perf_counter() - began
            if number + 1 < len(manifest.teachers):
                teacher.close()
            seconds += last
            tokens += sum(map(writer.tokens, places))
        stored = Storage(folder).sizes("")
    arrays = split_arrays(manifest, "train")
    kept = sum(stored[layout.shard_key(name, "train", array, 0)] for name in samples for array in arrays)
    return kept / tokens, tokens / seconds


def as_text(found: dict[str, Any]) -> str:
    """The estimate as a person reads it."""
    lines = [f"{'domain':<24} {'documents':>12} {'tokens':>16} {'rows':>12} {'validation':>10} {'bytes':>18}"]
    for name, part in [*found["domains"].items(), ("all", found["total"])]:
        lines.append(
            f"{name:<24} {part['documents']:>12,} {part['tokens']:>16,} {part['train_rows']:>12,} "
            f"{part['validation_rows']:>10,} {part['bytes']:>18,}" + (" at least" if part["at_least"] else "")
        )
    if found["total"]["at_least"]:
        lines.append("at least: the source is a stream without max_tokens; its end is not known")
    lines.append(f"about {found['bytes_per_token']:.0f} bytes a train token")
    if found["target"]["kind"] == "sampled":
        lines += _passes(found["domains"])
    if found["hours"] is None:
        lines.append("typical sizes; --probe measures them, and the time, on the teacher itself")
    else:
        hours = found["hours"]
        time = f"{hours:.1f} hours" if hours >= 1 else f"{60 * hours:.1f} minutes"
        lines.append(f"{found['tokens_per_second']:,.0f} tokens/s here: {time}")
    return "\n".join(lines)


def _passes(domains: dict[str, Any]) -> list[str]:
    """A line on how often draws may be read, with the smallest domain whose size is known."""
    tokens = {
        name: round(part["tokens"] * part["train_rows"] / (part["train_rows"] + part["validation_rows"]))
        for name, part in domains.items()
        if not part["at_least"]
    }
    if not tokens:
        return []
    name, least = min(tokens.items(), key=lambda item: item[1])
    most = layout.EPOCHS_OF_DRAWS
    return [
        f"draws are good for {most} passes over a domain, {most * least:,} tokens of training in {name}; "
        "past that their noise begins to be learnt (docs/targets.md)"
    ]
