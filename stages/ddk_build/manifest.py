"""The manifest of the cache that a configuration asks for."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.data.written import writers
from ddk_build.teacher.identity import teacher_info
from ddk_build.teacher.model import model_config
from ddk_build.teacher.tokenizer import tokenizer_digest, vocabulary
from ddk_cache.cache.metadata import read_manifest
from ddk_cache.errors import CacheError
from ddk_cache.format import layout
from ddk_cache.storage.storage import Storage

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def describe(config: BuildConfig, tokenizer: "PreTrainedTokenizerBase") -> layout.Manifest:
    """Return the manifest of the cache that ``config`` asks for; ``tokenizer`` is the common teacher's."""
    teacher_vocabulary = vocabulary(tokenizer)
    digests = {chats: tokenizer_digest(tokenizer, chats=chats) for chats in (False, True)}
    configured = list(map(teacher_info, config.teachers))
    teachers = _manifest_teachers(config.cache, configured)
    settings = [teacher.settings for teacher in teachers]
    written = {name: {"writer": writer} for name, writer in writers(config, teacher_vocabulary).items()}
    return layout.Manifest(
        format="ddk-cache",
        version=layout.FORMAT_VERSION,
        teachers=teachers,
        tokenizer_hash=teacher_vocabulary.fingerprint(),
        vocab_size=max(model_config(teacher).vocab_size for teacher in config.teachers),
        target=config.target,
        seq_length=config.seq_length,
        shard_rows=config.rows_per_shard,
        validation_rows=config.most_validation_rows,
        validation_targets=config.validation_targets,
        overlap=config.context,
        seed=config.seed,
        domains=tuple(
            layout.DomainSource(
                name=name,
                source=_source(domain, digests) | written.get(name, {}),
                max_tokens=domain.max_tokens,
                teacher_index=settings.index(
                    configured[config.teachers.index(config.teacher_of(name))].settings
                ),
            )
            for name, domain in config.domains.items()
        ),
    )


def writer_notes(manifest: layout.Manifest) -> Iterator[str]:
    """Yield a line on each domain whose writer was distilled from other teachers than the one that answers.

    Lightning OPD (arXiv 2604.13010): with two teachers the gradient keeps a bias.
    """
    for domain in manifest.domains:
        writer, teacher = domain.source.get("writer", {}), manifest.teacher_of(domain.name)
        names = [Path(name).name for name in writer.get("teachers", [])]
        is_teacher = teacher.weights is not None and writer.get("weights") == teacher.weights
        if names and Path(teacher.model).name not in names and not is_teacher:
            yield (
                f"{domain.name}: {writer['model']}, which wrote it, was distilled from "
                f"{', '.join(writer['teachers'])}, not from {teacher.model}: on-policy distillation works "
                "best with the teacher that the student has learned from"
            )


def _source(domain: DomainConfig, tokenizer_digests: Mapping[bool, str]) -> dict[str, Any]:
    """Return what decides a domain's documents: the configuration's keys and the tokenizer's digest.

    Without defaults: a key that a later version adds then changes nothing in this cache.
    """
    source = domain.model_dump(mode="json", exclude={"max_tokens", "teacher"}, exclude_defaults=True)
    if domain.tokens_column is None or domain.teacher_prefix_column is not None:
        has_chats = domain.messages_column is not None or domain.prompt_column is not None
        source["tokenizer"] = tokenizer_digests[has_chats]
    return source


def _manifest_teachers(cache: str, configured: list[layout.TeacherInfo]) -> tuple[layout.TeacherInfo, ...]:
    """Return the teachers by index: the common teacher, others in the cache, then new teachers.

    A teacher's index never changes, because its codebook is stored under it.
    """
    try:
        existing = read_manifest(Storage(cache))
    except CacheError:
        existing = None
    ordered = [configured[0], *(existing.teachers[1:] if existing else ()), *configured[1:]]
    by_settings = {layout.digest(teacher.settings): teacher for teacher in ordered}
    last = max(list(by_settings).index(layout.digest(teacher.settings)) for teacher in configured)
    return tuple(by_settings.values())[: last + 1]
