"""The teacher's tokenizer."""

from typing import TYPE_CHECKING

from ddk_build.config import BuildConfig, TeacherConfig
from ddk_cache.addresses import check_model, explain_load_failure
from ddk_cache.errors import ConfigError
from ddk_cache.vocabulary import Vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(teacher: TeacherConfig) -> "PreTrainedTokenizerBase":
    """Load the tokenizer that lies beside the teacher.

    Raises
    ------
    ConfigError
        There is no such folder or hub id, or no tokenizer in it that can be loaded.
    """
    from transformers import AutoTokenizer

    check_model("teacher.model", teacher.model)
    try:
        return AutoTokenizer.from_pretrained(
            teacher.model, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        reason = explain_load_failure(teacher.model, str(error).strip().partition("\n")[0])
        raise ConfigError(
            f"teacher.model: {teacher.model} has no tokenizer that can be loaded: {reason}"
        ) from error


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """The tokenizer's content, whose fingerprint the cache keeps."""
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)


def check_tokenizers(config: BuildConfig, words: Vocabulary) -> None:
    """Raise ConfigError where an id of ``words`` is another token to a domain's."""
    for name, domain in config.domains.items():
        if domain.teacher is not None:
            conflicts = words.conflicts(vocabulary(load_tokenizer(domain.teacher)))
            if conflicts:
                raise ConfigError(
                    f"domains.{name}.teacher: its tokenizer is not that of {config.teacher.model}: "
                    + "; ".join(conflicts)
                )
