"""Generate the student's continuation of a held-out document of each domain."""

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_cache import Cache, Split
from ddk_train.config import TrainConfig
from ddk_train.student.distributed import Ranks, measuring
from ddk_train.student.student import Student

PROMPT_TOKENS = 32  # of a text without a prompt of its own
MOST_PROMPT_TOKENS = 512  # of a conversation, up to its first answer
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
    documents = [held_out_document(cache[name].validation, config.sample_tokens) for name in cache.domains]
    uniforms = np.random.default_rng(config.seed).random((len(documents), config.sample_tokens))
    continuations: dict[int, list[int]] = {}
    with measuring(student):
        for length in sorted({len(document.prompt) for document in documents}):
            indices = [i for i, document in enumerate(documents) if len(document.prompt) == length]
            prompts = torch.from_numpy(np.stack([documents[i].prompt for i in indices])).long()
            drawn = torch.from_numpy(uniforms[indices]).to(ranks.device, torch.float32)
            made = student.continued(prompts.to(ranks.device), drawn).tolist()
            continuations |= zip(indices, made, strict=True)
    return [
        {
            "domain": name,
            "prompt": tokenizer.decode(document.prompt),
            "text": tokenizer.decode(document.text),
            "sample": tokenizer.decode(continuations[index]),
        }
        for index, (name, document) in enumerate(zip(cache.domains, documents, strict=True))
    ]


def held_out_document(split: Split, sample_tokens: int) -> HeldOut:
    """Return the longest of the documents that the first rows of a validation split begin with.

    The prompt of a conversation ends where the loss begins, with the first answer; of a text it is the first
    32 tokens.
    """
    rows = split.read(np.arange(min(ROWS, len(split))), targets=False, labels=False)
    documents = []  # tokens, and the length of the prompt without loss
    for tokens, segments, mask in zip(rows.tokens, rows.segments, rows.loss_mask, strict=True):
        is_first = segments == segments[0]
        documents.append((tokens[is_first], int(mask[is_first].argmax()) + 1))
    answered = [(tokens, cut) for tokens, cut in documents if 1 < cut <= MOST_PROMPT_TOKENS]
    if answered:
        tokens, cut = max(answered, key=lambda document: len(document[0]) - document[1])
    else:
        tokens = max((tokens for tokens, _ in documents), key=len)
        cut = min(PROMPT_TOKENS, len(tokens) - 1)
    return HeldOut(tokens[:cut], tokens[cut : cut + sample_tokens])
