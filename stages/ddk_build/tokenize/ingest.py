"""The first half of stage one: read the domains' sources and write their token shards."""

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256

from ddk_build.config import BuildConfig
from ddk_build.data.corpus import take
from ddk_build.data.documents import IngestStatistics
from ddk_build.data.packing.document_index import DocumentIndex
from ddk_build.data.packing.holdout import SplitSettings, Splitter
from ddk_build.tokenize.ingest_checkpoint import IngestCheckpoint
from ddk_build.tokenize.token_shards import TokenShards
from ddk_build.tokenize.workers import Tokenisers
from ddk_cache.cache.writer import Writer
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import DomainState, digest
from ddk_cache.util.progress import Meter, meter

Limit = int | None  # max_tokens

CHECKPOINT = "ingest-checkpoint"  # name of the blob
CHECKPOINT_SECONDS = 30.0  # between two checkpoints


def tokenise(writer: Writer, config: BuildConfig, tokenisers: Tokenisers) -> None:
    """Tokenise what the cache lacks of every domain.

    A domain whose ``max_tokens`` was raised resumes where its source pass ended, and gets the validation rows
    that it lacks. A domain with damaged tokens is read again, to the same bytes. An interrupted pass resumes
    from its last checkpoint.

    Raises ConfigError if a source cannot be read, lacks a column, or has no text, or no held-out token
    carries loss, and CacheError if a source has changed since the cache was built.
    """
    finished = [
        name
        for name, domain in config.domains.items()
        if (state := writer.state(name)) and writer.has_tokens(name) and not grows(state, domain.max_tokens)
    ]
    for name in finished:
        writer.write_blob(name, CHECKPOINT, None)  # a build may be killed after it writes the state
    if len(finished) == len(config.domains):
        return
    indexes = {name: read_index(writer, name) for name in config.domains}
    # Small domains first: they could hold out nothing once a large domain trains on all their documents.
    names = sorted(config.domains, key=lambda name: config.domains[name].max_tokens or float("inf"))
    plans = [
        plan_domain(writer, name, config.domains[name].max_tokens, has_index=indexes[name] is not None)
        for name in names
        if name not in finished or indexes[name] is None
    ]
    with meter("tokenising", "tokens", parts={plan.name: plan.tokens for plan in plans}) as progress:
        for plan in plans:
            indexes[plan.name] = Ingest(writer, config, plan, indexes).run(tokenisers, progress)
            progress.end(plan.name)


@dataclass(frozen=True)
class IngestPlan:
    """The source passes that a domain needs."""

    name: str
    limits: tuple[Limit, ...]
    """max_tokens of each pass."""
    state: DomainState | None
    """The domain before the first pass; None to start from the beginning of the source."""
    passes_to_repeat: int = 0
    """First passes, which hold out the same documents as before: the domain's tokens were lost."""

    @property
    def tokens(self) -> int | None:
        """Tokens to ingest; None if the end of the source is not known."""
        if self.limits[-1] is None:
            return None
        return self.limits[-1] - (0 if self.state is None else self.state.source_tokens)


def plan_domain(writer: Writer, name: str, limit: Limit, *, has_index: bool) -> IngestPlan:
    """Return the source passes that a domain needs: all of them if its tokens or its index are lost."""
    state = writer.state(name)
    if state is None:
        return IngestPlan(name, (limit,), None)
    new = (limit,) if grows(state, limit) else ()
    if has_index and writer.has_tokens(name):
        return IngestPlan(name, new, state)
    return IngestPlan(name, (*state.limits, *new), None, len(state.limits) if has_index else 0)


def grows(state: DomainState, limit: Limit) -> bool:
    """Return whether a ``max_tokens`` of ``limit`` asks for more of the source than was ingested."""
    before = state.limits[-1]
    return not state.exhausted and before is not None and (limit is None or limit > before)


class Ingest:
    """Carries out a domain's plan, resuming from its checkpoint. ``indexes`` are those of all domains."""

    def __init__(
        self,
        writer: Writer,
        config: BuildConfig,
        plan: IngestPlan,
        indexes: Mapping[str, DocumentIndex | None],
    ) -> None:
        self._writer, self._config, self._plan, self._name = writer, config, plan, plan.name
        self._others = {
            name: index for name, index in indexes.items() if name != plan.name and index is not None
        }
        stored = indexes[plan.name]
        self._chosen = frozenset(stored.held_out) if stored and plan.passes_to_repeat else None
        self._index = DocumentIndex() if plan.state is None or stored is None else stored
        self._statistics = IngestStatistics() if plan.state is None else ingest_statistics(plan.state)

    def run(self, tokenisers: Tokenisers, progress: Meter) -> DocumentIndex:
        """Ingest the domain and record its state; return its index."""
        checkpoint = IngestCheckpoint.from_bytes(
            self._writer.read_blob(self._name, CHECKPOINT), self._fingerprint
        )
        with TokenShards(self._writer, self._name, self._plan.state) as shards:
            first = 0
            if checkpoint is not None:
                first = checkpoint.passes_done
                self._index, self._statistics = checkpoint.index, checkpoint.statistics
                shards.restore(checkpoint.counts, checkpoint.pending)
            for index in range(first, len(self._plan.limits)):
                splitter = self._splitter(shards, index)
                if checkpoint is not None and index == first:
                    splitter.restore(dict(checkpoint.splitter))
                self._read_source(shards, splitter, index, tokenisers, progress)
            shards.flush()
        self._record(shards)
        return self._index

    def _splitter(self, shards: TokenShards, index: int) -> Splitter:
        """Return the splitter of a pass, which adds the validation rows that earlier passes lacked."""
        shards.sync()  # counts the rows of earlier passes
        settings = replace(
            SplitSettings.of(self._config),
            validation_rows=self._config.most_validation_rows - shards.counts["validation"].rows,
            chosen=self._chosen if index < self._plan.passes_to_repeat else None,
        )
        return Splitter(settings, self._statistics, self._index, self._others.values())

    def _read_source(
        self, shards: TokenShards, splitter: Splitter, index: int, tokenisers: Tokenisers, progress: Meter
    ) -> None:
        """Read the source up to a limit, from the row in the statistics; store checkpoints on the way."""
        statistics = self._statistics
        domain = self._config.domains[self._name]
        domain = domain.model_copy(update={"max_tokens": self._plan.limits[index]})
        parts = tokenisers.parts(self._name, domain, statistics.rows)
        tokens, last = statistics.tokens, time.monotonic()
        for documents in take(self._name, domain, parts, statistics):
            shards.add("train", splitter.add(documents))
            progress.advance(statistics.tokens - tokens, self._name)
            tokens = statistics.tokens
            if time.monotonic() - last > CHECKPOINT_SECONDS:
                self._store_checkpoint(shards, splitter, index)
                last = time.monotonic()
        for split, row in splitter.finish():
            shards.add(split, [row])

    def _store_checkpoint(self, shards: TokenShards, splitter: Splitter, passes_done: int) -> None:
        pending = shards.sync()
        checkpoint = IngestCheckpoint(
            self._fingerprint,
            passes_done,
            self._statistics,
            self._index,
            shards.counts,
            pending,
            splitter.state(),
        )
        self._writer.write_blob(self._name, CHECKPOINT, checkpoint.to_bytes())

    @cached_property
    def _fingerprint(self) -> str:
        """The digest of everything that decides the domain's rows."""
        state = self._plan.state
        return digest(
            {
                "domain": self._writer.manifest.fingerprint(self._name),
                "validation_rows": self._config.validation_rows,
                "limits": self._plan.limits,
                "state": None if state is None else state.model_dump(mode="json"),
                "held out before": None if self._chosen is None else sorted(self._chosen),
                "others": {
                    name: sha256(index.to_bytes()).hexdigest() for name, index in self._others.items()
                },
            }
        )

    def _record(self, shards: TokenShards) -> None:
        """Check that there are validation labels, then store the index and the state."""
        train, validation = shards.counts["train"], shards.counts["validation"]
        if not validation.rows and train.rows and self._others:
            raise ConfigError(
                f"domains.{self._name}: no document is left for validation: other domains "
                f"({', '.join(self._others)}) train on all of them; name {self._name} before those"
            )
        if not validation.labels:
            raise ConfigError(
                f"domains.{self._name}: no token of the validation split carries loss; raise validation_rows "
                "or seq_length"
            )
        before = () if self._plan.state is None else self._plan.state.limits
        limits = (*before, *self._plan.limits)
        self._writer.write_blob(self._name, index_name(limits), self._index.to_bytes())
        self._writer.set_state(self._name, domain_state(shards, self._statistics, limits))
        self._writer.write_blob(self._name, CHECKPOINT, None)


def read_index(writer: Writer, name: str) -> DocumentIndex | None:
    """Return a tokenised domain's index; None if it is damaged."""
    state = writer.state(name)
    if state is None:
        return None
    return DocumentIndex.from_bytes(writer.read_blob(name, index_name(state.limits)))


def index_name(limits: tuple[Limit, ...]) -> str:
    """Return the name of the blob of a domain's index after these passes."""
    return f"document-index-{len(limits)}"


def domain_state(shards: TokenShards, statistics: IngestStatistics, limits: tuple[Limit, ...]) -> DomainState:
    """Return the state of a domain whose source was read up to the last of ``limits``."""
    return DomainState(
        train=shards.counts["train"],
        validation=shards.counts["validation"],
        limits=limits,
        exhausted=statistics.exhausted,
        source_rows=statistics.rows,
        source_tokens=statistics.tokens,
        documents=statistics.documents,
        skipped=dict(statistics.skipped),
        left_over=statistics.left_over,
    )


def ingest_statistics(state: DomainState) -> IngestStatistics:
    """Return the statistics that ``domain_state`` recorded."""
    return IngestStatistics(
        rows=state.source_rows,
        documents=state.documents,
        tokens=state.source_tokens,
        exhausted=state.exhausted,
        skipped=Counter(state.skipped),
        left_over=state.left_over,
    )
