"""The student's tokenizer, which must be the cache's by content."""

from typing import TYPE_CHECKING

from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_cache.tokens import Vocabulary
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

    try:
        tokenizer = AutoTokenizer.from_pretrained(config.student, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"student: {config.student} has no tokenizer that can be loaded: {reason}"
        ) from error
    own = Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)
    if own.fingerprint() != cache.tokenizer_hash:
        raise ConfigError(
            f"student: its tokenizer is not the cache's: {'; '.join(cache.vocabulary.differences(own))} "
            "(the cache's first)"
        )
    return tokenizer
