"""The teacher's tokenizer."""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import BuildConfig, TeacherConfig
from ddk_cache.addresses import check_model, why_not
from ddk_cache.errors import ConfigError
from ddk_cache.tokens import Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

Places = NDArray[np.int64]
"""[L, 2]; each token's first character, and that behind its last."""


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
        reason = why_not(teacher.model, str(error).strip().partition("\n")[0])
        raise ConfigError(
            f"teacher.model: {teacher.model} has no tokenizer that can be loaded: {reason}"
        ) from error


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> Vocabulary:
    """The tokenizer's content, whose fingerprint the cache keeps."""
    return Vocabulary(tokenizer.get_vocab(), tokenizer.special_tokens_map)


def encode(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special_tokens: bool
) -> list[list[int]]:
    """Each text's token ids, as ``tokenizer(texts)`` has them.

    Where that is the tokenizers library's work alone, it is asked itself for ids and no more: the tokens'
    places in the text, which transformers always asks for, take a third of the time.
    """
    backend = _backend(tokenizer)
    if backend is None:
        found = tokenizer(list(texts), add_special_tokens=special_tokens, verbose=False)
        return list(found["input_ids"])
    encodings = backend.encode_batch_fast(list(texts), add_special_tokens=special_tokens)
    return [encoding.ids for encoding in encodings]


def encode_with_places(
    tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str], *, special_tokens: bool
) -> list[tuple[list[int], Places]]:
    """Each text's token ids, and where the tokens stand in it."""
    pairs: Iterable[tuple[list[int], list[tuple[int, int]]]]
    backend = _backend(tokenizer)
    if backend is None:
        found = tokenizer(
            list(texts), add_special_tokens=special_tokens, return_offsets_mapping=True, verbose=False
        )
        pairs = zip(found["input_ids"], found["offset_mapping"], strict=True)
    else:
        encodings = backend.encode_batch(list(texts), add_special_tokens=special_tokens)
        pairs = ((encoding.ids, encoding.offsets) for encoding in encodings)
    return [(ids, np.fromiter(chain.from_iterable(one), np.int64).reshape(-1, 2)) for ids, one in pairs]


def _backend(tokenizer: "PreTrainedTokenizerBase") -> "Tokenizer | None":
    """What tokenises, where transformers' own classes do no more than call it."""
    from transformers import PreTrainedTokenizerFast

    own = type(tokenizer)
    if own.__call__ is not PreTrainedTokenizerFast.__call__ or (
        own._encode_plus is not PreTrainedTokenizerFast._encode_plus
    ):
        return None
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    return backend


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
