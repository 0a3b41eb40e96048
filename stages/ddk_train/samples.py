"""What the student writes: held-out beginnings, one a domain, that it continues before and after training."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from ddk_cache import Cache
from ddk_train.config import TrainConfig
from ddk_train.distributed import Ranks, measuring
from ddk_train.student import Student

PROMPT_TOKENS = 32  # at most; all domains' prompts are as long as the shortest
ROWS = 8  # of a validation split that are looked at for a document


class Beginning(NamedTuple):
    """A held-out document's first tokens, and those that follow in the text."""

    prompt: NDArray[np.int32]
    text: NDArray[np.int32]


def samples(
    student: Student, cache: Cache, tokenizer: Any, config: TrainConfig, ranks: Ranks
) -> list[dict[str, str]]:
    """A sample for each domain: prompt, how the text goes on, and how the student does.

    Its tokens are drawn at temperature 1 by numbers that the seed alone decides, so that what differs between
    two steps is the student. All processes call it; a sharded student needs all of them.
    """
    found = beginnings(cache, config.sample_tokens)
    prompts = torch.from_numpy(np.stack([one.prompt for one in found])).long()
    uniforms = np.random.default_rng(config.seed).random((len(found), config.sample_tokens))
    with measuring(student):
        written = student.continued(
            prompts.to(ranks.device), torch.from_numpy(uniforms).to(ranks.device, torch.float32)
        )
    return [
        {
            "domain": name,
            "prompt": tokenizer.decode(one.prompt),
            "text": tokenizer.decode(one.text),
            "sample": tokenizer.decode(tokens),
        }
        for name, one, tokens in zip(cache.domains, found, written.cpu(), strict=True)
    ]


def beginnings(cache: Cache, sample_tokens: int) -> Sequence[Beginning]:
    """Of each domain the longest of the first documents in its validation split's first rows."""
    documents = []
    for name in cache.domains:
        split = cache[name].validation
        rows = split.read(np.arange(min(ROWS, len(split))), targets=False, labels=False)
        firsts = (
            tokens[segments == segments[0]]
            for tokens, segments in zip(rows.tokens, rows.segments, strict=True)
        )
        documents.append(max(firsts, key=len))
    prompt = min(PROMPT_TOKENS, *(len(document) - 1 for document in documents))
    return [Beginning(one[:prompt], one[prompt : prompt + sample_tokens]) for one in documents]
