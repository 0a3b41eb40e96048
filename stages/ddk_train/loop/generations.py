"""Generate the student's continuation of a held-out document of each domain."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_cache import Cache
from ddk_train.config import TrainConfig
from ddk_train.student.distributed import Ranks, measuring
from ddk_train.student.student import Student

PROMPT_TOKENS = 32  # at most; all domains' prompts are as long as the shortest
ROWS = 8  # of a validation split that are searched for a document


class HeldOut(NamedTuple):
    """The first tokens of a held-out document, and the text after them."""

    prompt: NDArray[np.int32]
    text: NDArray[np.int32]


def generate(
    student: Student, cache: Cache, tokenizer: Any, config: TrainConfig, ranks: Ranks
) -> list[dict[str, str]]:
    """Return a line of samples.jsonl for each domain: prompt, the document's text, the student's ``sample``.

    Tokens are drawn at temperature 1, with random numbers that depend on the seed alone, so only the student
    differs between two steps. Collective: a sharded student needs all processes.
    """
    documents = held_out_documents(cache, config.sample_tokens)
    prompts = torch.from_numpy(np.stack([document.prompt for document in documents])).long()
    uniforms = np.random.default_rng(config.seed).random((len(documents), config.sample_tokens))
    with measuring(student):
        continuations = student.continued(
            prompts.to(ranks.device), torch.from_numpy(uniforms).to(ranks.device, torch.float32)
        )
    return [
        {
            "domain": name,
            "prompt": tokenizer.decode(document.prompt),
            "text": tokenizer.decode(document.text),
            "sample": tokenizer.decode(tokens),
        }
        for name, document, tokens in zip(cache.domains, documents, continuations.cpu(), strict=True)
    ]


def held_out_documents(cache: Cache, sample_tokens: int) -> Sequence[HeldOut]:
    """Return the longest first document among each validation split's first rows."""
    documents = []
    for name in cache.domains:
        split = cache[name].validation
        rows = split.read(np.arange(min(ROWS, len(split))), targets=False, labels=False)
        first_documents = (
            tokens[segments == segments[0]]
            for tokens, segments in zip(rows.tokens, rows.segments, strict=True)
        )
        documents.append(max(first_documents, key=len))
    length = min(PROMPT_TOKENS, *(len(document) - 1 for document in documents))
    return [HeldOut(document[:length], document[length : length + sample_tokens]) for document in documents]
