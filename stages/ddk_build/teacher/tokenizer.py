"""Load the teacher's tokenizer and compare tokenizers."""

import json
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from ddk_build.config import BuildConfig, TeacherConfig
from ddk_cache.errors import ConfigError
from ddk_cache.format import layout
from ddk_cache.format.vocabulary import Vocabulary
from ddk_cache.util.model_folder import check_model, load_failure

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(teacher: TeacherConfig) -> "PreTrainedTokenizerBase":
    """Return the teacher's tokenizer.

    Raises ConfigError if the folder or hub id does not exist, or its tokenizer does not load.
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


def tokenizer_digest(tokenizer: "PreTrainedTokenizerBase", *, chats: bool = False) -> str:
    """Return the sha256 of everything that decides a text's tokens and, with ``chats``, a conversation's.

    The vocabulary's fingerprint tells whether ids mean the same tokens. Tokenizers with equal fingerprints
    may still cut a text differently: by merges, normalizer, pre-tokenizer, post-processor or added tokens.
    """
    content: dict[str, Any] = {
        "split_special_tokens": getattr(tokenizer, "split_special_tokens", False),
        "vocabulary": vocabulary(tokenizer).fingerprint(),
        "chat_template": tokenizer.chat_template if chats else None,
    }
    if tokenizer.is_fast:
        backend = json.loads(tokenizer.backend_tokenizer.to_str())
        content["backend"] = {key: backend[key] for key in backend.keys() - {"truncation", "padding"}}
    else:
        with TemporaryDirectory() as folder:
            files = map(Path, tokenizer.save_vocabulary(folder))
            content["files"] = {path.name: sha256(path.read_bytes()).hexdigest() for path in files}
    return layout.digest(content)


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
