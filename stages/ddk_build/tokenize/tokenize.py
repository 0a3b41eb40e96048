"""The first half of stage one: turn the domains' sources into token shards."""

from ddk_build.config import BuildConfig
from ddk_build.data.document_index import DocumentIndex
from ddk_build.tokenize.ingest import CHECKPOINT, Ingest, IngestPlan, Limit, index_name
from ddk_build.tokenize.workers import Tokenisers
from ddk_cache.cache.writer import Writer
from ddk_cache.format.layout import DomainState
from ddk_cache.util.progress import meter


def tokenise(writer: Writer, config: BuildConfig, tokenisers: Tokenisers) -> None:
    """Tokenise what the cache lacks of every domain.

    A domain whose ``max_tokens`` was raised resumes where its source pass ended, and gets the validation rows
    that it lacks. A domain with damaged tokens is read again, to the same bytes. An interrupted pass resumes
    from its last checkpoint.

    Raises
    ------
    ConfigError
        A source cannot be read, lacks a column, or has no text; or no held-out token carries loss.
    CacheError
        A source has changed since the cache was built.
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
    # Small domains first: they could hold out nothing once a large one trains on all their documents.
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


def read_index(writer: Writer, name: str) -> DocumentIndex | None:
    """Return a tokenised domain's index; None if it is damaged."""
    state = writer.state(name)
    if state is None:
        return None
    return DocumentIndex.from_bytes(writer.read_blob(name, index_name(state.limits)))
