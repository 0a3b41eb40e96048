"""The first half of stage one: a domain's text becomes the token arrays, which are the list of work."""

from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import DomainConfig
from ddk_build.corpus import documents
from ddk_build.documents import Intake
from ddk_build.packing import RowBatch, split_rows
from ddk_cache.errors import ConfigError
from ddk_cache.layout import SPLITS, DomainState, Split, SplitState, shards
from ddk_cache.progress import meter
from ddk_cache.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, NDArray[Any]]  # by name
Limit = int | None  # max_tokens


def tokenise(writer: Writer, name: str, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """See that the cache has all of a domain's tokens.

    Nothing happens where they are there. A domain whose ``max_tokens`` was raised goes on where its source
    was left. One with damaged tokens is read anew, and the same bytes come out.

    Raises
    ------
    ConfigError
        The source cannot be read, lacks the column, or has no text; or nothing held out carries loss.
    CacheError
        The source has changed since the cache was built.
    """
    state = writer.state(name)
    limits = () if state is None else state.limits
    if state is None or _grows(state, domain.max_tokens):
        limits = (*limits, domain.max_tokens)
    if state is None or not writer.tokens_are_whole(name):
        rows = _Rows(writer, name)
        intake = Intake()
        for limit in limits:
            _read(rows, intake, domain, tokenizer, limit)
    elif limits != state.limits:
        rows = _Rows(writer, name, state)
        intake = _intake(state)
        _read(rows, intake, domain, tokenizer, domain.max_tokens)
    else:
        return
    rows.flush()
    if not rows.counts["validation"].labels:
        raise ConfigError(
            f"domains.{name}: no token of the validation split carries loss; raise validation_rows or "
            "seq_length"
        )
    writer.set_state(name, _state(rows, intake, limits))


def _grows(state: DomainState, limit: Limit) -> bool:
    before = state.limits[-1]
    return not state.exhausted and before is not None and (limit is None or limit > before)


def _read(
    rows: "_Rows", intake: Intake, domain: DomainConfig, tokenizer: "PreTrainedTokenizerBase", limit: Limit
) -> None:
    """Read the source up to ``limit`` tokens, from where ``intake`` stands."""
    manifest = rows.writer.manifest
    limited = domain.model_copy(update={"max_tokens": limit})
    with meter(f"{rows.domain}: tokenising", "tokens", limit) as shown:
        seen = 0
        batches = split_rows(
            documents(rows.domain, limited, tokenizer, seed=manifest.seed, intake=intake),
            seq_length=manifest.seq_length,
            validation_rows=manifest.validation_rows,
            batch_rows=manifest.shard_rows,
            intake=intake,
        )
        for split, batch in batches:
            rows.add(split, batch)
            shown.advance(intake.tokens - seen)
            seen = intake.tokens


class _Rows:
    """Gathers rows into shards and counts them; goes on behind the rows of ``state``."""

    def __init__(self, writer: Writer, domain: str, state: DomainState | None = None) -> None:
        self.writer = writer
        self.domain = domain
        empty = SplitState(rows=0, tokens=0, labels=0)
        self.counts: dict[Split, SplitState] = {
            split: empty if state is None else state.split(split) for split in SPLITS
        }
        self._waiting: dict[Split, Arrays | None] = {"train": None, "validation": None}
        if state is not None and state.train.rows % writer.manifest.shard_rows:
            last = shards(state.train.rows, writer.manifest.shard_rows) - 1
            self._waiting["train"] = writer.read_tokens(domain, "train", last)

    def add(self, split: Split, batch: RowBatch) -> None:
        new: Arrays = {"tokens": batch.tokens, "segments": batch.segments, "loss_mask": batch.loss_mask}
        before = self.counts[split]
        self.counts[split] = SplitState(
            rows=before.rows + len(batch.tokens),
            tokens=before.tokens + int((batch.segments > 0).sum()),
            labels=before.labels + int(batch.loss_mask.sum()),
        )
        waiting = self._waiting[split]
        if waiting is not None:
            new = {array: np.concatenate([waiting[array], values]) for array, values in new.items()}
        size = self.writer.manifest.shard_rows
        first = (self.counts[split].rows - len(new["tokens"])) // size
        whole = len(new["tokens"]) // size
        for number in range(whole):
            part = {array: values[number * size :][:size] for array, values in new.items()}
            self.writer.write_tokens(self.domain, split, first + number, part)
        rest = {array: values[whole * size :] for array, values in new.items()}
        self._waiting[split] = rest if len(rest["tokens"]) else None

    def flush(self) -> None:
        """Write the last shard of each split, which may be a part of one."""
        for split, rows in self._waiting.items():
            if rows is not None:
                self.writer.write_tokens(
                    self.domain, split, self.counts[split].rows // self.writer.manifest.shard_rows, rows
                )


def _intake(state: DomainState) -> Intake:
    return Intake(
        rows=state.source_rows,
        documents=state.documents,
        tokens=state.source_tokens,
        exhausted=state.exhausted,
        skipped=Counter(state.skipped),
        held_out=state.held_out,
        left_over=state.left_over,
    )


def _state(rows: _Rows, intake: Intake, limits: tuple[Limit, ...]) -> DomainState:
    return DomainState(
        train=rows.counts["train"],
        validation=rows.counts["validation"],
        limits=limits,
        exhausted=intake.exhausted,
        source_rows=intake.rows,
        source_tokens=intake.tokens,
        documents=intake.documents,
        skipped=dict(intake.skipped),
        left_over=intake.left_over,
        held_out=intake.held_out,
    )
