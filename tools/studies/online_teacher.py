"""A teacher that answers while the student trains, and targets from its full distribution: for online_kd.py.

The build's own code (``ddk_build.teacher.targets``, ``ddk_build.capture.scoring``) makes the targets from the
same text and, where the draws are those of a cache, with the same offsets. What a cache adds is the
codec's rounding of top-k entries; the counts of draws are exact.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field, model_validator
from torch import Tensor

from ddk_build.capture.scoring import sampling_offsets
from ddk_build.teacher.targets import sparse_target
from ddk_cache import Cache
from ddk_cache.errors import ConfigError
from ddk_cache.format.layout import Target
from ddk_cache.util.configuration import Config
from ddk_train.config import TrainConfig
from ddk_train.data.batches import Batch, make_batch
from ddk_train.student.files import load_model
from ddk_train.student.probe import examine
from ddk_train.student.student import Student
from ddk_train.student.tokenizer import load_tokenizer

Int64 = NDArray[np.int64]
Entries = tuple[Tensor, Tensor, Tensor]  # ids int32 [M, E], logprobs [M, E], tail_logprob [M]


class Choice(Config):
    """What a student is trained on: which part of the teacher's distribution, at which positions."""

    target: Target | None = Field(None, description="as in a build; null: the full distribution")
    draws: Literal["cached", "fresh", "independent", "threshold"] = Field(
        "cached",
        description="of a sampled target. cached: systematic, the same at each visit; fresh: systematic, new "
        "at each visit; independent: each draw for itself, new at each visit; threshold: tokens of 1/samples "
        "and more exactly, the rest by systematic draws, the same at each visit",
    )
    head: Annotated[int, Field(ge=0)] = Field(
        0,
        description="of a sampled target, cached: best tokens kept exactly, beside draws of the others",
    )
    positions: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="the part of a batch's labels that is trained on, the least sure ones"
    )
    unsure: Literal["student", "teacher", "nobody"] = Field(
        "student", description="whose entropy chooses the positions; nobody: chance"
    )
    train: dict[str, Any] = Field({}, description="keys of ddk-cache train that differ")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        sampled = self.target is not None and self.target.kind == "sampled"
        if (self.draws != "cached" or self.head) and not sampled:
            raise ValueError("draws, head: are of a sampled target")
        if self.head and self.draws != "cached":
            raise ValueError("head: goes with cached draws")
        return self


def load_frozen(model: str, config: TrainConfig, cache: Cache) -> Student:
    """Load a model in float32 that answers and is not trained.

    Raises
    ------
    ConfigError
        It cannot be loaded, its tokenizer is not the cache's, or it does not take packed rows.
    """
    config = config.model_copy(update={"student": model, "lora": None})
    loaded = load_model(config, cache, load_tokenizer(config, cache))
    frozen = Student(loaded, config, examine(loaded, config, cache.seq_length))
    if not frozen.layout.packed:
        raise ConfigError(f"{model}: takes each document as a row of its own; these tools read packed rows")
    return frozen.eval().requires_grad_(False)


def all_logits(model: Student, batch: Batch) -> Tensor:
    """Logits [M, V] float32 of a batch's positions with a label, scaled and capped as the model does."""
    return model.logits(model.hidden(batch).index_select(0, batch.label_positions))


class Teacher:
    """The full distribution of any rows of a cache's training split; rows that fit are remembered.

    Parameters
    ----------
    model
        See ``load_frozen``.
    cache
        Whose text is read; its targets are not.
    memory
        Bytes of logits to remember.
    """

    def __init__(self, model: Student, cache: Cache, memory: int) -> None:
        self.model, self.cache = model, cache
        self._room, self._logits = memory, dict[tuple[int, int], Tensor]()

    def read(self, domain: Int64, row: Int64) -> tuple[Batch, Tensor]:
        """Return the batch of these rows [n], without targets, and the teacher's logits [M, V] for it."""
        by_domain = {int(index): row[domain == index] for index in np.unique(domain)}
        parts = {
            index: self.cache[self.cache.domains[index]].train.read(rows, targets=False, labels=False)
            for index, rows in by_domain.items()
        }
        batch = make_batch(parts, self.model.vocab_size)
        keys = [(index, int(row_index)) for index, rows in by_domain.items() for row_index in rows]
        if all(key in self._logits for key in keys):
            return batch, torch.cat([self._logits[key] for key in keys])
        with torch.no_grad():
            logits = all_logits(self.model, batch)
        labels = torch.bincount(batch.label_positions // self.cache.seq_length, minlength=len(keys))
        for key, part in zip(keys, logits.split(labels.tolist()), strict=True):
            if key not in self._logits and self._room >= part.nbytes:
                self._logits[key] = part.clone()
                self._room -= part.nbytes
        return batch, logits

    def cached_offsets(self, domain: Int64, row: Int64, batch: Batch) -> Tensor:
        """Return the sampling offsets [M] of a build with the cache's seed, at the positions of a batch."""
        manifest = self.cache.manifest
        offsets = [
            sampling_offsets(
                manifest.seed,
                self.cache.domains[index],
                "train",
                row[domain == index].tolist(),
                manifest.seq_length,
            )
            for index in np.unique(domain)
        ]
        return torch.from_numpy(np.concatenate(offsets)).flatten()[batch.label_positions]


def entries(
    choice: Choice, logits: Tensor, labels: Tensor, cached: Tensor, random: torch.Generator
) -> Entries:
    """Return what ``choice`` keeps of logits [M, V]; ``cached``: a build's offsets, [M] in [0, 1)."""
    target = choice.target
    if target is None:
        return full(logits)
    if target.kind == "topk":
        return sparse_target(logits, labels, target)[:3]
    if choice.head:
        return _head_and_draws(logits, labels, target, choice.head, cached)
    return _DRAWS[choice.draws](logits, labels, target, cached, random)


def full(logits: Tensor) -> Entries:
    """Return the whole vocabulary as entries, in its order, without a tail."""
    ids = torch.arange(logits.shape[1], dtype=torch.int32).expand(logits.shape)
    return ids, logits.log_softmax(-1), torch.full(logits.shape[:1], -torch.inf)


def _cached(
    logits: Tensor, labels: Tensor, target: Target, cached: Tensor, random: torch.Generator
) -> Entries:
    return sparse_target(logits, labels, target, cached)[:3]


def _fresh(
    logits: Tensor, labels: Tensor, target: Target, cached: Tensor, random: torch.Generator
) -> Entries:
    new = torch.rand(cached.shape, dtype=torch.float64, generator=random)
    return sparse_target(logits, labels, target, new)[:3]


def _independent(
    logits: Tensor, labels: Tensor, target: Target, cached: Tensor, random: torch.Generator
) -> Entries:
    drawn = torch.multinomial(_softened(logits, target), target.samples, replacement=True, generator=random)
    counts = torch.zeros_like(logits).scatter_add_(1, drawn, torch.ones(drawn.shape))
    return _nonzero(counts / target.samples, target.samples)


def _threshold(
    logits: Tensor, labels: Tensor, target: Target, cached: Tensor, random: torch.Generator
) -> Entries:
    """Right on average, like systematic draws, with no more entries, and without noise above the threshold.

    Of the R that the light tokens weigh together, ceil(R n) equally spaced points get an equal share each.
    """
    mass = _softened(logits, target).double()
    light = mass.masked_fill(mass >= 1 / target.samples, 0)
    sums = light.cumsum(-1)
    weight = sums[:, -1:].clone()
    points = (weight * target.samples).ceil().clamp(min=1)
    draw = torch.arange(target.samples, dtype=torch.float64)
    # Below the end, also after rounding: the first sum above a point belongs to a token that has mass.
    locations = ((draw + cached[:, None]) / points * weight).minimum(
        weight.nextafter(torch.zeros_like(weight))
    )
    shares = (weight / points * (draw < points)).where(weight > 0, 0)
    drawn = torch.searchsorted(sums, locations, right=True).clamp(max=logits.shape[1] - 1)
    kept = (mass - light).scatter_add_(1, drawn, shares)
    return _nonzero(kept.float(), target.samples + 1)


_DRAWS: Mapping[str, Callable[[Tensor, Tensor, Target, Tensor, torch.Generator], Entries]] = {
    "cached": _cached,
    "fresh": _fresh,
    "independent": _independent,
    "threshold": _threshold,
}


def _head_and_draws(logits: Tensor, labels: Tensor, target: Target, head: int, cached: Tensor) -> Entries:
    """``head`` entries exactly; the mass of the others by draws among them."""
    top = Target(top_k=head, temperature=target.temperature)
    ids, logprobs, tail = sparse_target(logits, labels, top)[:3]
    others = logits.scatter(1, ids.long(), -torch.inf)
    drawn, shares, nothing = sparse_target(others, labels, target, cached)[:3]
    return torch.cat([ids, drawn], -1), torch.cat([logprobs, shares + tail[:, None]], -1), nothing


def _softened(logits: Tensor, target: Target) -> Tensor:
    return (logits / target.temperature).softmax(-1)


def _nonzero(mass: Tensor, most: int) -> Entries:
    """Masses [M, V], at most ``most`` of a row not 0, as entries."""
    kept, ids = mass.topk(min(most, mass.shape[1]))
    return ids.int().masked_fill(kept == 0, -1), kept.log(), torch.full(mass.shape[:1], -torch.inf)


def entropy(logits: Tensor) -> Tensor:
    """Return the entropy of each row of logits [M, V], in nats, [M]."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).sum(-1)


def least_sure(batch: Batch, uncertainty: Tensor, part: float) -> Batch:
    """Return the batch with only the share of its positions where ``uncertainty`` [M] is largest (SE-KD)."""
    count = max(1, round(part * len(uncertainty)))
    kept = uncertainty.topk(count).indices.sort().values
    return replace(
        batch,
        **{
            name: getattr(batch, name)[kept]
            for name in ("label_positions", "labels", "domain", "ids", "logprobs", "tail_logprob")
        },
    )
