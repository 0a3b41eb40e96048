"""Stage one: tokenise the corpus into the cache, then let the teacher answer it shard by shard."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build.capture.check import checked_teacher
from ddk_build.capture.cluster import Capture, Cluster
from ddk_build.capture.pipeline import Pipeline, needs_codebook, tokens_by_domain
from ddk_build.capture.samples import documents_to_check
from ddk_build.config import BuildConfig
from ddk_build.data.rows import prompt_notes
from ddk_build.data.written import with_columns
from ddk_build.manifest import describe, writer_notes
from ddk_build.teacher.engines import Teacher, check_engine, check_length, check_teacher
from ddk_build.teacher.tokenizer import check_tokenizers, load_tokenizer, vocabulary
from ddk_build.tokenize.ingest import grows, tokenise
from ddk_build.tokenize.ray_tasks import ray_tasks
from ddk_build.tokenize.workers import Tokenisers, processes
from ddk_cache.cache.card import write_card
from ddk_cache.cache.reader import Cache, open_cache
from ddk_cache.cache.writer import Writer, open_writer
from ddk_cache.errors import CacheError, ConfigError, counted
from ddk_cache.format import layout
from ddk_cache.format.layout import ShardKey
from ddk_cache.util.progress import meter

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

MOST_UNCONFIRMED = 0.1  # of a cache's tokens that a build answers again without --yes


def build_cache(
    config: BuildConfig,
    cluster: Cluster | None = None,
    *,
    tokens_only: bool = False,
    yes: bool = False,
    report: Callable[[str], object] = logger.info,
) -> Cache:
    """Build the cache, or resume an earlier build of it; finished shards are not done again.

    Parameters
    ----------
    cluster
        The Ray cluster whose engines do the work; None runs one engine in this process.
    tokens_only
        Only tokenise and pack. This needs no engine and no GPU; a later build starts with the engine.
    yes
        Answer shards again whose codebook is lost, also if they are more than a tenth of the cache.
    report
        Called with one line for each finished domain.

    Returns
    -------
    The opened cache; with ``tokens_only`` it has no finished train rows yet.

    Raises
    ------
    ConfigError
        The configuration is wrong, or differs from the one that the cache was built with; or much has to be
        answered again without ``yes``.
    CacheError
        The cache cannot be written, another build holds its lock, or objects that were written are missing.
    """
    config = with_columns(config)
    runs_here = cluster is None and not tokens_only
    for teacher in config.teachers:
        check_length(teacher, config.teacher_length, config.length_key)
        if runs_here:
            check_engine(teacher)
    tokenizer = load_tokenizer(config.teacher)
    check_tokenizers(config, vocabulary(tokenizer))
    with open_writer(config.cache, describe(config, tokenizer), vocabulary(tokenizer)) as writer:
        if not tokens_only:
            discard_useless_answers(writer, yes=yes)
        teacher_indices = [index for index in range(len(writer.manifest.teachers)) if has_work(writer, index)]
        if teacher_indices:
            for teacher in config.teachers:
                check_teacher(teacher, config.teacher_length, is_here=runs_here)
        if tokens_only:
            _tokenise(writer, config, tokenizer, cluster)
            for name in config.domains:
                report(summary(name, writer.existing_state(name)))
        else:
            documents = {i: documents_to_check(writer, config, i, tokenizer) for i in teacher_indices}
            engines = local_engine if cluster is None else cluster.engines
            with engines(writer, config, documents) as capture:
                _tokenise(writer, config, tokenizer, cluster)
                capture(remaining_work(writer, teacher_indices))
                states = finalize(writer)
                if work := remaining_work(writer, teacher_indices):  # objects were lost meanwhile
                    capture(work)
                    states = finalize(writer)
            check_complete(writer)
            for name in config.domains:
                report(summary(name, states[name]))
            write_card(writer.holder)
    return open_cache(config.cache, allow_incomplete=tokens_only)


def discard_useless_answers(writer: Writer, *, yes: bool) -> None:
    """Drop the answers of each teacher whose codebook is lost or of another build: they cannot be decoded.

    Raises ConfigError if they are more than a tenth of the cache, without ``yes``.
    """
    states = filter(None, (writer.state(domain.name) for domain in writer.manifest.domains))
    total = sum(state.split(split).tokens for state in states for split in layout.SPLITS)
    for index in range(len(writer.manifest.teachers)):
        shards = writer.encoded_otherwise(index)
        if not shards:
            continue
        share = sum(map(writer.tokens, shards)) / max(total, 1)
        line = (
            f"{writer.url}/{layout.codebook_groups(index)[0]}: is lost or of another build: "
            f"{counted(len(shards), 'shard')} ({share:.0%} of the cache) must be answered again"
        )
        if share > MOST_UNCONFIRMED and not yes:
            raise ConfigError(f"{line}; put it back from a copy of the cache, or add --yes")
        logger.warning("%s", line)
        writer.discard_answers(index)


def finalize(writer: Writer) -> dict[str, layout.DomainState]:
    """Finalize every domain from a new listing; return the states by domain."""
    names = [domain.name for domain in writer.manifest.domains]
    with ThreadPoolExecutor() as pool:
        return dict(zip(names, pool.map(writer.finalize_domain, names), strict=True))


def check_complete(writer: Writer) -> None:
    """Raise CacheError, with a shard's name, if the last listing lacked an object."""
    work = remaining_work(writer, range(len(writer.manifest.teachers)))
    shards = list(chain.from_iterable(work.values()))
    if shards:
        others = f" and {counted(len(shards) - 1, 'other')}" if len(shards) > 1 else ""
        raise CacheError(
            f"{writer.url}: {shards[0]}{others}: objects that this build wrote or saw are missing: does "
            "another program delete files there? Run the build again"
        )


def has_work(writer: Writer, teacher_index: int) -> bool:
    """Return whether a teacher may have something to answer, before the corpus is tokenised."""

    def is_unfinished(domain: layout.DomainSource) -> bool:
        state = writer.state(domain.name)
        if state is None or grows(state, domain.max_tokens):
            return True
        return any(writer.unfinished(domain.name, split) for split in reversed(layout.SPLITS))

    domains = [domain for domain in writer.manifest.domains if domain.teacher_index == teacher_index]
    return bool(domains) and (needs_codebook(writer, teacher_index) or any(map(is_unfinished, domains)))


def remaining_work(writer: Writer, teacher_indices: Sequence[int]) -> dict[int, list[ShardKey]]:
    """Return the unanswered shards by teacher index, validation first: training may begin on a part.

    A teacher without a codebook is listed even if no shard remains.
    """
    work: dict[int, list[ShardKey]] = {
        index: [
            ShardKey(name, split, shard)
            for split in reversed(layout.SPLITS)
            for name in writer.manifest.domains_of(index)
            for shard in writer.unfinished(name, split)
        ]
        for index in teacher_indices
    }
    return {index: shards for index, shards in work.items() if shards or needs_codebook(writer, index)}


@contextmanager
def local_engine(
    writer: Writer, config: BuildConfig, documents: Mapping[int, Sequence[NDArray[np.int32]]]
) -> Iterator[Capture]:
    """Start and check the first teacher's engine in this process; yield the function that captures.

    The engine starts before anything is tokenised, so that a build that cannot run fails at once. Each
    further teacher starts after the one before has answered all of its shards.
    """
    started: dict[int, Teacher] = {}

    def start(teacher_index: int) -> None:
        domain = writer.manifest.domains_of(teacher_index)[0]
        started[teacher_index] = checked_teacher(
            config.teacher_of(domain), config.target, config.teacher_length, documents[teacher_index]
        )

    def capture(work: Mapping[int, list[ShardKey]]) -> None:
        for index, shards in work.items():
            for other in started.keys() - {index}:
                started.pop(other).close()
            if index not in started:
                start(index)
            answer(writer, started[index], index, shards)

    for index in list(documents)[:1]:
        start(index)
    yield capture


def _tokenise(
    writer: Writer, config: BuildConfig, tokenizer: "PreTrainedTokenizerBase", cluster: Cluster | None
) -> None:
    for note in (*prompt_notes(config.domains, tokenizer), *writer_notes(writer.manifest)):
        logger.info(note)
    start_others = processes if cluster is None else ray_tasks
    with Tokenisers(config, tokenizer, start_others) as tokenisers:
        tokenise(writer, config, tokenisers)


def answer(writer: Writer, teacher: Teacher, teacher_index: int, shards: Sequence[ShardKey]) -> None:
    """Let the teacher answer its shards; fit its codebook first if the cache has none."""
    with Pipeline(writer, teacher, teacher_index) as pipeline:
        if needs_codebook(writer, teacher_index):
            pipeline.calibrate()
        with meter("teacher", "tokens", parts=tokens_by_domain(writer, shards)) as progress:
            for shard in shards:
                pipeline.take(shard, progress.advance)
            pipeline.finish(progress.advance)


def summary(name: str, state: layout.DomainState) -> str:
    """Return one line on a domain: its rows, the teacher's perplexity, skipped documents by reason."""
    loss = state.teacher_cross_entropy
    held_out = state.validation.rows / (state.train.rows + state.validation.rows)
    line = (
        f"{name}: {counted(state.train.rows, 'train row')} ({state.train.tokens:,} tokens), "
        f"{counted(state.validation.rows, 'row')} held out ({held_out:.1%}), "
        f"{counted(state.documents, 'document')}, "
        + ("not yet read by the teacher" if loss is None else f"teacher perplexity {math.exp(loss):.2f}")
    )
    if state.skipped:
        line += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in state.skipped.items())
    if state.left_over:
        line += f"; {state.left_over:,} tokens held out of train did not fit into the validation rows"
    return line
