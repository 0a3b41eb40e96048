"""``build --dry-run``: check a build without writing anything or starting an engine."""

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.data.corpus import DocumentMaker
from ddk_build.data.documents import IngestStatistics
from ddk_build.data.rows import prompt_notes
from ddk_build.data.written import with_columns
from ddk_build.manifest import describe, writer_notes
from ddk_build.teacher.engines import check_length, check_teacher
from ddk_build.teacher.tokenizer import check_tokenizers, load_tokenizer, vocabulary
from ddk_build.tokenize.ingest import grows
from ddk_cache.cache.compatibility import check_cache
from ddk_cache.cache.metadata import read_manifest, read_state
from ddk_cache.errors import CacheNotFoundError, counted
from ddk_cache.format.layout import DomainState
from ddk_cache.storage.storage import Storage


def dry_run(config: BuildConfig, *, is_here: bool) -> str:
    """Return the merged configuration as YAML, with the results of the checks as comments.

    ``is_here``: the engine will run in this process, not on a cluster.

    Raises ConfigError or CacheError if the build would fail: the teacher, its weights or engine, the
    tokenizer, a source or the cache.
    """
    config = with_columns(config)
    for teacher in config.teachers:
        check_length(teacher, config.teacher_length, config.length_key)
        check_teacher(teacher, config.teacher_length, is_here=is_here)
    tokenizer = load_tokenizer(config.teacher)
    check_tokenizers(config, vocabulary(tokenizer))
    manifest = describe(config, tokenizer)
    check_cache(config.cache, manifest)
    text = config.to_yaml() + f"# {config.cache}: can be built there\n"
    states = _states(config.cache)
    for name, domain in config.domains.items():
        text += f"# {name}: {_to_do(domain, states.get(name))}\n"
        maker = DocumentMaker(name, domain, tokenizer, config.seed, config.seq_length)
        statistics = IngestStatistics()
        documents = maker.documents(statistics)
        first = next(documents)
        # Raises where there is no other document to hold out; a copy is none.
        next(document for document in documents if document.digest != first.digest)
        text += f"# {name}: can be read; its first document has {len(first):,} tokens\n"
        if skipped := statistics.skip_reasons():
            rows = counted(statistics.rows, "row")
            text += f"# {name}: of the first {rows}, these are skipped: {'; '.join(skipped)}\n"
    notes = (*prompt_notes(config.domains, tokenizer), *writer_notes(manifest))
    return text + "".join(f"# {note}\n" for note in notes)


def _states(url: str) -> dict[str, DomainState]:
    """Return the states of the domains that the cache has; none if there is no cache yet."""
    try:
        storage = Storage(url)
    except CacheNotFoundError:
        return {}
    manifest = read_manifest(storage)
    if manifest is None:
        return {}
    states = {domain.name: read_state(storage, manifest, domain.name) for domain in manifest.domains}
    return {name: state for name, state in states.items() if state is not None}


def _to_do(domain: DomainConfig, state: DomainState | None) -> str:
    """Return what a build adds to a domain."""
    limit = "all of its source" if domain.max_tokens is None else f"up to {domain.max_tokens:,} tokens"
    if state is None:
        return f"new, {limit}"
    line = f"has {state.source_tokens:,} tokens of its source"
    if grows(state, domain.max_tokens):
        return f"{line}; grows to {limit}"
    return f"{line}; no text will be added" + ("" if state.complete else ", and answers are missing")
