"""Stage one, from top to bottom: tokens into the cache, then shard after shard of the teacher's answers."""

import math
from itertools import groupby

import click

from ddk_build.check import checked_teacher, sample
from ddk_build.config import BuildConfig
from ddk_build.identity import teacher_info
from ddk_build.pipeline import Pipeline, Place
from ddk_build.scale_out import Cluster
from ddk_build.teacher import check_engine, check_length, check_teacher, model_config
from ddk_build.tokenising import tokenise
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache import layout
from ddk_cache.card import write_card
from ddk_cache.progress import meter
from ddk_cache.tokens import Vocabulary
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
    check_length(config.teacher, config.seq_length)
    is_here = cluster is None and not tokens_only
    if is_here:
        check_engine(config.teacher)
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    with open_writer(config.cache, describe(config, words), words) as writer:
        if not is_done(writer):
            check_teacher(config.teacher, config.seq_length, is_here=is_here)
        tokenise(writer, config, tokenizer)
        if tokens_only:
            for name in config.domains:
                click.echo(summary(name, writer.existing_state(name)))
            return
        work = unfinished(writer)
        if work or needs_codebook(writer):
            if cluster is None:
                capture(config, writer, work)
            else:
                cluster.capture(config, writer, work)
        for name in config.domains:
            click.echo(summary(name, writer.settle(name)))
        write_card(writer.holder)


def describe(config: BuildConfig, words: Vocabulary) -> layout.Manifest:
    """The manifest of the cache that ``config`` asks for."""
    teacher = config.teacher
    return layout.Manifest(
        format="ddk-cache",
        version=layout.FORMAT_VERSION,
        teachers=(teacher_info(teacher),),
        tokenizer_hash=words.fingerprint(),
        vocab_size=model_config(teacher).vocab_size,
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
                source=domain.model_dump(exclude={"max_tokens"}, exclude_defaults=True),
                max_tokens=domain.max_tokens,
            )
            for name, domain in config.domains.items()
        ),
    )


def is_done(writer: Writer) -> bool:
    """Whether an earlier build has finished every domain, and none is to grow: no teacher will be needed."""
    states = ((domain, writer.state(domain.name)) for domain in writer.manifest.domains)
    return all(state and state.complete and state.limits[-1] == domain.max_tokens for domain, state in states)


def needs_codebook(writer: Writer) -> bool:
    """Whether the codec's tables are still to be made; labels alone need none."""
    return writer.manifest.target.kind != "label" and writer.codebook() is None


def unfinished(writer: Writer) -> list[Place]:
    """The shards still to be done: validation first, so that training can begin on a part of the cache."""
    return [
        (domain.name, split, shard)
        for split in reversed(layout.SPLITS)
        for domain in writer.manifest.domains
        for shard in writer.unfinished(domain.name, split)
    ]


def capture(config: BuildConfig, writer: Writer, work: list[Place]) -> None:
    """Let one engine, in this process, answer shard after shard; first what the codec's tables need."""
    documents = sample(writer, writer.manifest.domains[0].name)
    teacher = checked_teacher(config.teacher, config.target, config.seq_length, documents)
    with Pipeline(writer, teacher) as pipeline:
        if needs_codebook(writer):
            pipeline.calibrate()
        for (domain, split), places in groupby(work, lambda place: place[:2]):
            numbers = [shard for _, _, shard in places]
            with meter(f"{domain}: {split}", "tokens", writer.tokens(domain, split, numbers)) as shown:
                for shard in numbers:
                    pipeline.capture((domain, split, shard))
                    shown.advance(writer.tokens(domain, split, [shard]))
        pipeline.finish()


def summary(name: str, state: layout.DomainState) -> str:
    """A domain in one line: what is there, what the teacher makes of it, what was left out and why."""
    loss = state.teacher_cross_entropy
    line = (
        f"{name}: {state.train.rows:,} train rows ({state.train.tokens:,} tokens), "
        f"{state.validation.rows:,} validation rows, {state.documents:,} documents, "
        + ("not yet read by the teacher" if loss is None else f"teacher perplexity {math.exp(loss):.2f}")
    )
    if state.skipped:
        line += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in state.skipped.items())
    if state.left_over:
        line += f"; {state.left_over:,} tokens held out of train had no room in validation"
    return line
