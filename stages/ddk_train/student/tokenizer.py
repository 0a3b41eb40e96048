"""Load the student's tokenizer, and compare its token ids with the cache's."""

from typing import TYPE_CHECKING

from ddk_cache import Cache
from ddk_cache.errors import ConfigError, brief
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.addresses import check_model, explain_load_failure
from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: TrainConfig, cache: Cache) -> "PreTrainedTokenizerBase":
    """Load the student's tokenizer; raise ConfigError if an id is another token in the cache."""
    from transformers import AutoTokenizer

    check_model("student", config.student)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
    except Exception as error:  # a repository's code may raise any type
        reason = brief(error)
        if not isinstance(error, ImportError):
            reason = explain_load_failure(config.student, reason)
        raise ConfigError(f"student: {config.student} has no loadable tokenizer: {reason}") from error
    conflicts = cache.vocabulary.conflicts(_vocabulary(tokenizer))
    if conflicts:
        raise ConfigError(
            f"student: its tokenizer is not the cache's: {'; '.join(conflicts)} (the cache's first)"
        )
    return tokenizer


def harmless_differences(tokenizer: "PreTrainedTokenizerBase", cache: Cache) -> str | None:
    """Return a line on differences from the cache's tokenizer that change no id's meaning, or None."""
    differences = cache.vocabulary.differences(_vocabulary(tokenizer))
    if not differences:
        return None
    return f"the student's tokenizer differs harmlessly: {'; '.join(differences)} (the cache's first)"


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
