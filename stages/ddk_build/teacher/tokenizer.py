"""Load the teacher's tokenizer and compare tokenizers."""

from typing import TYPE_CHECKING

from ddk_build.config import BuildConfig, TeacherConfig
from ddk_build.teacher.model import load_failure
from ddk_cache.errors import ConfigError
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.storage.addresses import check_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(teacher: TeacherConfig) -> "PreTrainedTokenizerBase":
    """Return the teacher's tokenizer.

    Raises
    ------
    ConfigError
        The folder or hub id does not exist, or its tokenizer does not load.
    """
    check_model("teacher.model", teacher.model)
    try:
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    except Exception as error:  # any type: transformers passes on the errors of its parts
        reason = load_failure(teacher.model, error)
        raise ConfigError(f"teacher.model: {teacher.model}: its tokenizer does not load: {reason}") from error


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """Return the tokenizer's vocabulary, whose fingerprint the cache stores."""
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)


def check_tokenizers(config: BuildConfig, expected: Vocabulary) -> None:
    """Raise ConfigError where a domain's teacher assigns a token id differently from ``expected``."""
    for name, domain in config.domains.items():
        if domain.teacher is not None:
            conflicts = expected.conflicts(vocabulary(load_tokenizer(domain.teacher)))
            if conflicts:
                raise ConfigError(
                    f"domains.{name}.teacher: its tokenizer differs from that of {config.teacher.model}: "
                    f"{'; '.join(conflicts)}; give a teacher with the same tokenizer"
                )
