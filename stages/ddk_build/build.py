"""Stage one, from top to bottom: tokens into the cache, then shard after shard of the teacher's answers."""

import math
import os
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby

import click
import numpy as np

from ddk_build.config import BuildConfig
from ddk_build.scoring import Arrays, encode, offsets, score
from ddk_build.teacher import Teacher, load_teacher, model_config
from ddk_build.tokenising import tokenise
from ddk_build.tokenizer import load_tokenizer, vocabulary
from ddk_cache import codec, layout
from ddk_cache.progress import meter
from ddk_cache.tokens import Vocabulary
from ddk_cache.writer import Writer, open_writer

# Share of the corpus, and least and most tokens, that the teacher reads beforehand for the codec's tables.
CALIBRATION_SHARE, CALIBRATION_LEAST, CALIBRATION_MOST = 1 / 20, 2_048, 65_536

Place = tuple[str, layout.Split, int]  # domain, split, shard


def build_cache(config: BuildConfig) -> None:
    """Build the cache, or go on with it; what is finished is not done again.

    Raises
    ------
    ConfigError
        The configuration is wrong, or differs from what the cache was built with.
    CacheError
        The cache cannot be written, or another build is at work.
    """
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    with open_writer(config.cache, describe(config, words), words) as writer:
        for name, domain in config.domains.items():
            tokenise(writer, name, domain, tokenizer)
        work, codebook = unfinished(writer), writer.codebook()
        if work or codebook is None:
            teacher = load_teacher(config.teacher, config.target, config.seq_length)
            capture(writer, teacher, codebook or calibrate(writer, teacher), work)
        for name in config.domains:
            click.echo(summary(name, writer.settle(name)))


def describe(config: BuildConfig, words: Vocabulary) -> layout.Manifest:
    """The manifest of the cache that ``config`` asks for."""
    teacher = config.teacher
    return layout.Manifest(
        format="ddk-cache",
        version=1,
        teacher=layout.TeacherInfo(
            model=teacher.model,
            revision=teacher.revision,
            dtype=teacher.dtype,
            engine=teacher.engine,
            engine_version=engine_version(teacher.engine),
        ),
        tokenizer_hash=words.fingerprint(),
        vocab_size=model_config(teacher).vocab_size,
        target=config.target,
        seq_length=config.seq_length,
        shard_rows=config.rows_per_shard,
        validation_rows=config.validation_rows,
        seed=config.seed,
        domains=tuple(
            layout.DomainSource(
                name=name, source=domain.model_dump(exclude={"max_tokens"}), max_tokens=domain.max_tokens
            )
            for name, domain in config.domains.items()
        ),
    )


def engine_version(engine: str) -> str:
    """Of the installed package; vLLM's CPU build has a name of its own."""
    for package in (engine, f"{engine}-cpu"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "not installed"


def unfinished(writer: Writer) -> list[Place]:
    """The shards still to be done: validation first, so that training can begin on a part of the cache."""
    return [
        (domain.name, split, shard)
        for split in reversed(layout.SPLITS)
        for domain in writer.manifest.domains
        for shard in writer.unfinished(domain.name, split)
    ]


def calibrate(writer: Writer, teacher: Teacher) -> codec.Codebook:
    """Let the teacher read some train rows of every domain, evenly spread, and fit the codec's tables."""
    manifest = writer.manifest
    totals = {domain.name: writer.split_state(domain.name, "train").rows for domain in manifest.domains}
    share = sum(totals.values()) * manifest.seq_length * CALIBRATION_SHARE
    tokens = min(max(share, CALIBRATION_LEAST), CALIBRATION_MOST)
    wanted = math.ceil(tokens / manifest.seq_length / len(totals))
    ids, logprobs = [], []
    with meter("calibration", "rows", wanted * len(totals)) as shown:
        for name, total in totals.items():
            for row in np.unique(np.linspace(0, total - 1, min(wanted, total)).astype(int)).tolist():
                shard, first = divmod(row, manifest.shard_rows)
                found = answers(writer, teacher, (name, "train", shard), first, first + 1)
                there = found["ids"][..., 0] >= 0
                ids.append(found["ids"][there])
                logprobs.append(found["logprobs"][there])
                shown.advance(1)
    codebook = codec.fit(np.concatenate(ids), np.concatenate(logprobs), manifest.target, manifest.vocab_size)
    writer.set_codebook(codebook)
    return codebook


def capture(writer: Writer, teacher: Teacher, codebook: codec.Codebook, work: list[Place]) -> None:
    """Let the teacher answer shard after shard, while finished ones are encoded and written beside it.

    A shard's requests form a batch of their own, so its answers depend on that shard alone. No more shards
    wait than there are writers, so memory stays flat however slow the disk is.
    """
    writers = max(1, min(4, (os.cpu_count() or 1) // 2))
    waiting: deque[Future[None]] = deque()

    def store(place: Place, before: Arrays, found: Arrays) -> None:
        if len(found["label_logprob"]):
            stored = encode(found, codebook, writer.manifest.target)
            before = {name: np.concatenate([before[name], stored[name]]) for name in stored}
        writer.write_answers(*place, before)

    with ThreadPoolExecutor(writers) as pool:
        for (domain, split), places in groupby(work, lambda place: place[:2]):
            numbers = [shard for _, _, shard in places]
            with meter(f"{domain}: {split}", "tokens", writer.tokens(domain, split, numbers)) as shown:
                for shard in numbers:
                    place = (domain, split, shard)
                    before = writer.read_answers(*place)
                    found = answers(writer, teacher, place, first=len(before["label_logprob"]))
                    waiting.append(pool.submit(store, place, before, found))
                    if len(waiting) > writers:
                        waiting.popleft().result()
                    shown.advance(writer.tokens(domain, split, [shard]))
        for future in waiting:
            future.result()


def answers(writer: Writer, teacher: Teacher, place: Place, first: int = 0, end: int | None = None) -> Arrays:
    """What the teacher says of the rows ``first`` to ``end`` of a shard; see ``scoring.score``."""
    domain, split, shard = place
    manifest = writer.manifest
    tokens = writer.read_tokens(*place)
    assert tokens is not None, "tokenise saw to it that they are whole"
    rows = {name: values[first:end] for name, values in tokens.items()}
    target = manifest.target if split == "train" else None
    draws = None
    if target and target.kind == "sampled":
        numbers = shard * manifest.shard_rows + np.arange(len(tokens["tokens"]))[first:end]
        draws = offsets(manifest.seed, domain, split, numbers.tolist(), manifest.seq_length)
    return score(teacher, rows, target, draws)


def summary(name: str, state: layout.DomainState) -> str:
    """A domain in one line: what is there, what the teacher makes of it, what was left out and why."""
    assert state.teacher_cross_entropy is not None
    line = (
        f"{name}: {state.train.rows:,} train rows ({state.train.tokens:,} tokens), "
        f"{state.validation.rows:,} validation rows, {state.documents:,} documents, "
        f"teacher perplexity {math.exp(state.teacher_cross_entropy):.2f}"
    )
    if state.skipped:
        line += "; left out: " + ", ".join(f"{count:,} {reason}" for reason, count in state.skipped.items())
    return line
