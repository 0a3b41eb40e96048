"""Load the student's tokenizer, and compare its token ids with the cache's."""

from typing import TYPE_CHECKING

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.model_folder import check_model, load_failure
from ddk_cache.util.packages import require
from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: TrainConfig, cache: Cache) -> "PreTrainedTokenizerBase":
    """Load the student's tokenizer; raise ConfigError if an id is another token in the cache."""
    tokenizer = read_tokenizer("student", config.student, trust_remote_code=config.trust_remote_code)
    if conflicts := cache.vocabulary.conflicts(_vocabulary(tokenizer)):
        raise ConfigError(f"student: {_advice(conflicts, config.student, cache)}")
    return tokenizer


def fit(cache: Cache, student: str) -> str:
    """Return a line: whether a model's tokenizer is the cache's and, if not, what makes it so."""
    require("train", "transformers")
    vocabulary = _vocabulary(read_tokenizer("student", student))
    conflicts = cache.vocabulary.conflicts(vocabulary)
    if not conflicts:
        return f"{student} can be trained from this cache: every id is the same token"
    shared = len(vocabulary.ids.keys() & cache.vocabulary.ids.keys())
    advice = _advice(conflicts, student, cache)
    return f"{student}: {advice}. {shared:,} of the cache's {len(cache.vocabulary.ids):,} tokens are in both"


def _advice(conflicts: list[str], student: str, cache: Cache) -> str:
    return (
        f"its tokenizer is not the cache's: {'; '.join(conflicts)} (the cache's first). Write it with the "
        f"cache's: ddk-cache transplant {student} NEW_FOLDER --tokenizer {cache.manifest.teachers[0].model}"
    )


def read_tokenizer(key: str, model: str, *, trust_remote_code: bool = False) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder or hub id; raise ConfigError, which names ``key``, if there is none."""
    from transformers import AutoTokenizer

    check_model(key, model)
    try:
        return AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
    except Exception as error:  # a repository's code may raise any type
        reason = load_failure(model, error)
        raise ConfigError(f"{key}: {model} has no loadable tokenizer: {reason}") from error


def harmless_differences(tokenizer: "PreTrainedTokenizerBase", cache: Cache) -> str | None:
    """Return a line on differences from the cache's tokenizer that change no id's meaning, or None."""
    differences = cache.vocabulary.differences(_vocabulary(tokenizer))
    if not differences:
        return None
    return f"the student's tokenizer differs harmlessly: {'; '.join(differences)} (the cache's first)"


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
