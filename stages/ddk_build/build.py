"""Stage one, from top to bottom: tokens into the cache, then shard after shard of the teacher's answers."""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import click

from ddk_build.arrivals import Arrivals
from ddk_build.check import checked_teacher, sample
from ddk_build.config import BuildConfig
from ddk_build.identity import teacher_info
from ddk_build.model import model_config
from ddk_build.pipeline import Pipeline, ShardKey, needs_codebook, tokens_by_domain
from ddk_build.samples import keep_sample
from ddk_build.scale_out import Cluster
from ddk_build.teacher import check_engine, check_length, check_teacher
from ddk_build.tokenisers import Tokenisers, processes
from ddk_build.tokenising import grows, tokenise
from ddk_build.tokenizer import check_tokenizers, load_tokenizer, vocabulary
from ddk_cache import layout
from ddk_cache.card import write_card
from ddk_cache.errors import CacheError, counted
from ddk_cache.metadata import read_manifest
from ddk_cache.progress import meter
from ddk_cache.storage import Storage
from ddk_cache.vocabulary import Vocabulary
from ddk_cache.writer import Writer, open_writer


def build_cache(config: BuildConfig, cluster: Cluster | None = None, *, tokens_only: bool = False) -> None:
    """Build the cache, or go on with it; what is finished is not done again.

    Parameters
    ----------
    cluster
        Whose engines do the work; None for one engine in this process.
    tokens_only
        Tokenise and pack alone: needs no engine and no GPU, and a later build begins with the engine.

    Raises
    ------
    ConfigError
        The configuration is wrong, or differs from what the cache was built with.
    CacheError
        The cache cannot be written, or another build is at work.
    """
    for teacher in config.teachers:
        check_length(teacher, config.seq_length)
    is_here = cluster is None and not tokens_only
    if is_here:
        for teacher in config.teachers:
            check_engine(teacher)
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    check_tokenizers(config, words)
    with open_writer(config.cache, describe(config, words), words) as writer:
        numbers = [number for number in range(len(writer.manifest.teachers)) if has_work(writer, number)]
        if numbers:
            for teacher in config.teachers:
                check_teacher(teacher, config.seq_length, is_here=is_here)
        for name in wanted_samples(writer, numbers):
            keep_sample(writer, config, name, tokenizer)
        helpers = processes if cluster is None else cluster.tokenisers
        if tokens_only:
            with Tokenisers(config, tokenizer, helpers) as tokenisers:
                for name in tokenise(writer, config, tokenisers):
                    click.echo(summary(name, writer.existing_state(name)))
            return
        with Arrivals(writer, config, tokenizer, helpers) as arrivals:
            if cluster is not None:
                cluster.answer(config, writer, numbers, partial(all_work, writer, arrivals, numbers))
            else:
                for number in numbers:
                    answer(config, writer, arrivals, number)
        with ThreadPoolExecutor() as pool:
            for name, state in zip(
                config.domains, pool.map(writer.finalize_domain, config.domains), strict=True
            ):
                click.echo(summary(name, state))
        write_card(writer.holder)


def describe(config: BuildConfig, words: Vocabulary) -> layout.Manifest:
    """The manifest of the cache that ``config`` asks for."""
    teachers = known_teachers(config)
    numbers = {layout.digest(_deciding(teacher)): number for number, teacher in enumerate(teachers)}
    return layout.Manifest(
        format="ddk-cache",
        version=layout.FORMAT_VERSION,
        teachers=teachers,
        tokenizer_hash=words.fingerprint(),
        vocab_size=max(model_config(teacher).vocab_size for teacher in config.teachers),
        target=config.target,
        seq_length=config.seq_length,
        shard_rows=config.rows_per_shard,
        validation_rows=config.validation_rows,
        validation_targets=config.validation_targets,
        overlap=config.context,
        seed=config.seed,
        domains=tuple(
            layout.DomainSource(
                # What is left at its default is left out, so that keys to come change nothing in old caches.
                name=name,
                source=domain.model_dump(exclude={"max_tokens", "teacher"}, exclude_defaults=True),
                max_tokens=domain.max_tokens,
                teacher_index=numbers[layout.digest(_deciding(teacher_info(config.teacher_of(name))))],
            )
            for name, domain in config.domains.items()
        ),
    )


def known_teachers(config: BuildConfig) -> tuple[layout.TeacherInfo, ...]:
    """Whom the manifest lists: the common teacher, the others where the cache has them, and the new ones.

    A teacher's number never changes, as its codebook has it for a name.
    """
    found = [teacher_info(teacher) for teacher in config.teachers]
    try:
        there = read_manifest(Storage(config.cache))
    except CacheError:
        there = None
    order = [found[0], *(there.teachers[1:] if there else ()), *found[1:]]
    now = {layout.digest(_deciding(teacher)): teacher for teacher in order}
    last = max(list(now).index(layout.digest(_deciding(teacher))) for teacher in found)
    return tuple(now.values())[: last + 1]


def _deciding(teacher: layout.TeacherInfo) -> dict[str, Any]:
    """What tells one teacher from another."""
    return teacher.model_dump(mode="json", exclude={"engine_version"})


def has_work(writer: Writer, number: int) -> bool:
    """Whether there is something for a teacher to answer, as far as that is known before all is tokenised."""

    def is_left(domain: layout.DomainSource) -> bool:
        state = writer.state(domain.name)
        if state is None or grows(state, domain.max_tokens):
            return True
        return any(writer.unfinished(domain.name, split) for split in reversed(layout.SPLITS))

    own = [domain for domain in writer.manifest.domains if domain.teacher_index == number]
    return bool(own) and (needs_codebook(writer, number) or any(map(is_left, own)))


def wanted_samples(writer: Writer, numbers: Sequence[int]) -> Iterator[str]:
    """The domains of which teachers read something before anything is tokenised: for tables, or a check."""
    for number in numbers:
        first, *others = writer.manifest.domains_of(number)
        if needs_codebook(writer, number):
            yield from (first, *others)
        elif writer.state(first) is None or not writer.has_tokens(first):
            yield first


def all_work(writer: Writer, arrivals: Arrivals, numbers: Sequence[int]) -> dict[int, list[ShardKey]]:
    """These teachers' shards that are still to be done, once every domain has its tokens."""
    works = {number: list(chain.from_iterable(arrivals.work(number))) for number in numbers}
    return {number: work for number, work in works.items() if work or needs_codebook(writer, number)}


def answer(config: BuildConfig, writer: Writer, arrivals: Arrivals, number: int) -> None:
    """Let a teacher's engine, in this process, answer shard after shard; first what its tables need.

    The engine starts before anything is tokenised: an hour later is late to hear that it cannot. The last
    teacher keeps its memory: it ends with the process.
    """
    domain = writer.manifest.domains_of(number)[0]
    teacher = checked_teacher(
        config.teacher_of(domain), config.target, config.seq_length, sample(writer, domain)
    )
    rounds = arrivals.work(number)
    first = next(rounds, [])
    with Pipeline(writer, teacher, number) as pipeline:
        if needs_codebook(writer, number):
            pipeline.calibrate()
        with meter("teacher", "tokens", parts=dict.fromkeys(arrivals.missing(number))) as shown:
            for work in chain([first], rounds):
                shown.expect(tokens_by_domain(writer, work))
                for place in work:
                    pipeline.take(place, shown.advance)
            pipeline.finish(shown.advance)
    if number + 1 < len(writer.manifest.teachers):
        teacher.close()


def summary(name: str, state: layout.DomainState) -> str:
    """A domain in one line: what is there, what the teacher makes of it, what was left out and why."""
    loss = state.teacher_cross_entropy
    line = (
        f"{name}: {counted(state.train.rows, 'train row')} ({state.train.tokens:,} tokens), "
        f"{counted(state.validation.rows, 'validation row')}, {counted(state.documents, 'document')}, "
        + ("not yet read by the teacher" if loss is None else f"teacher perplexity {math.exp(loss):.2f}")
    )
    if state.skipped:
        line += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in state.skipped.items())
    if state.left_over:
        line += f"; {state.left_over:,} tokens held out of train had no room in validation"
    return line
