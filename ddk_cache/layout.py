"""What lies where in a cache: the manifest, the arrays' names, types, chunks and shards, the version."""

from typing import Annotated, Literal

from pydantic import Field

from ddk_cache.configuration import Config

FORMAT = "ddk-cache"
FORMAT_VERSION = 1


class Target(Config):
    """What is kept of the teacher's distribution at each position."""

    kind: Literal["topk", "sampled"] = Field("topk", description="topk: the best entries; sampled: draws")
    top_k: Annotated[int, Field(ge=1, le=4096)] = Field(64, description="topk: entries kept a token")
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(1.0, description="topk: keep those in this nucleus")
    samples: Annotated[int, Field(ge=1, le=4096)] = Field(24, description="sampled: draws a token")
    temperature: Annotated[float, Field(gt=0, le=100)] = Field(1.0, description="softmax(logits / this)")

    @property
    def width(self) -> int:
        """The most entries a position can have (E of every shape)."""
        return self.top_k if self.kind == "topk" else self.samples
