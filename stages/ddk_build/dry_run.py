"""``build --dry-run``: what can be known to be wrong is looked for, and nothing is written or spent."""

import yaml

from ddk_build.config import BuildConfig
from ddk_build.corpus import documents
from ddk_build.documents import Intake
from ddk_build.manifest import describe
from ddk_build.teacher import check_teacher
from ddk_build.tokenizer import check_tokenizers, load_tokenizer, vocabulary
from ddk_cache.extension import check_place


def dry_run(config: BuildConfig, *, is_here: bool) -> str:
    """The merged configuration as YAML, and as comments what was found.

    ``is_here``: the engine will run in this process, not on a cluster.

    Raises
    ------
    ConfigError, CacheError
        What the build would end with: of the teacher, its weights' names and engine, the tokenizer, the
        sources and the cache's place.
    """
    for teacher in config.teachers:
        check_teacher(teacher, config.seq_length, is_here=is_here)
    tokenizer = load_tokenizer(config.teacher)
    words = vocabulary(tokenizer)
    check_tokenizers(config, words)
    check_place(config.cache, describe(config, words))
    found = []
    for name, domain in config.domains.items():
        taken = documents(
            name, domain, tokenizer, seed=config.seed, intake=Intake(), seq_length=config.seq_length
        )
        found.append(f"# {name}: can be read; its first document has {len(next(taken)):,} tokens\n")
    text = yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    return f"{text}# {config.cache}: can be built there\n{''.join(found)}"
