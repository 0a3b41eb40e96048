"""What writes completions, and what it is asked for."""

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from ddk_build.generate.prompts import Prompt


class Shard(NamedTuple):
    """A range of a domain's prompts, whose completions are one file."""

    domain: str
    first: int
    end: int

    @property
    def file(self) -> str:
        """The file's path in the folder of completions."""
        return f"{self.domain}/{self.first:08}-{self.end:08}.parquet"


@dataclass(frozen=True)
class Request:
    """One completion to write."""

    shard: Shard
    index: int
    """The prompt's, among those of its domain."""
    prompt: Prompt
    sample: int
    seed: int


@dataclass(frozen=True)
class Completion:
    """What the engine wrote: its own token ids, with the end token if it wrote one."""

    tokens: list[int]
    logprobs: list[float]
    """Of each token, in nats at temperature 1, before top_p and the like."""
    finish_reason: str
    """"stop" at an end token or a stop text, "length" at max_tokens."""
    text: str


class Engine(Protocol):
    """Writes completions: each depends on its prompt and seed alone, where the engine is batch-invariant."""

    def complete(self, requests: Iterable[Request]) -> Iterator[tuple[Request, Completion]]:
        """Yield completions as they end, in any order; take requests while there is room for them."""
        ...


def completion_seed(seed: int, prompt: Prompt, sample: int) -> int:
    """Return the seed of one completion, 63 bits: it depends on these three alone."""
    digest = hashlib.sha256(f"{seed}/{prompt.id}/{sample}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1
