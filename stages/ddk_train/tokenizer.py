"""The student's tokenizer, which must be the cache's by content."""

from typing import TYPE_CHECKING

from ddk_cache import Cache
from ddk_cache.addresses import check_model, explain_load_failure
from ddk_cache.errors import ConfigError
from ddk_cache.vocabulary import Vocabulary
from ddk_train.config import TrainConfig

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(config: TrainConfig, cache: Cache) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies beside the student.

    Raises
    ------
    ConfigError
        There is none, or an id means another token to it than to the cache; the message names the first.
    """
    from transformers import AutoTokenizer

    check_model("student", config.student)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = explain_load_failure(config.student, str(error).strip().partition("\n")[0])
        raise ConfigError(
            f"student: {config.student} has no tokenizer that can be loaded: {reason}"
        ) from error
    conflicts = cache.vocabulary.conflicts(_vocabulary(tokenizer))
    if conflicts:
        raise ConfigError(
            f"student: its tokenizer is not the cache's: {'; '.join(conflicts)} (the cache's first)"
        )
    return tokenizer


def harmless_differences(tokenizer: "PreTrainedTokenizerBase", cache: Cache) -> str | None:
    """A line on what differs from the cache's tokenizer though every id means the same; None: nothing."""
    found = cache.vocabulary.differences(_vocabulary(tokenizer))
    if not found:
        return None
    return f"the student's tokenizer differs where it does no harm: {'; '.join(found)} (the cache's first)"


def _vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
