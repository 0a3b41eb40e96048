"""The first half of stage one: the domains' texts become the token arrays, which are the list of work."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.corpus import documents
from ddk_build.documents import Intake
from ddk_build.holdout import Splitting, split_rows
from ddk_build.ledger import Ledger, Others
from ddk_build.packing import RowBatch
from ddk_cache.errors import ConfigError
from ddk_cache.layout import MOST_SHARDS, SPLITS, DomainState, Split, SplitState, shards
from ddk_cache.progress import Meter, meter
from ddk_cache.writer import Writer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Arrays = dict[str, NDArray[Any]]  # by name
Limit = int | None  # max_tokens


def tokenise(writer: Writer, config: BuildConfig, tokenizer: "PreTrainedTokenizerBase") -> None:
    """See that the cache has all tokens of every domain.

    Nothing happens where they are there. A domain whose ``max_tokens`` was raised goes on where its source
    was left; while it has fewer validation rows than it should, these grow too. One with damaged tokens is
    read anew, and the same bytes come out.

    Raises
    ------
    ConfigError
        A source cannot be read, lacks the column, or has no text; or nothing held out carries loss.
    CacheError
        A source has changed since the cache was built.
    """
    states = {name: writer.state(name) for name in config.domains}
    whole = {name: state is not None and writer.has_tokens(name) for name, state in states.items()}
    if all(
        state is not None and whole[name] and not _grows(state, config.domains[name].max_tokens)
        for name, state in states.items()
    ):
        return
    ledgers = {
        name: None if state is None else _ledger(writer, name, state) for name, state in states.items()
    }
    # Small ones first: they could hold out nothing if a large one trained on all they have.
    todo: dict[str, tuple[tuple[Limit, ...], DomainState | None]] = {}
    for name in sorted(config.domains, key=lambda name: config.domains[name].max_tokens or float("inf")):
        state, limit = states[name], config.domains[name].max_tokens
        grows = state is not None and _grows(state, limit)
        if state is None:
            todo[name] = (limit,), None
        elif ledgers[name] is None or not whole[name]:
            todo[name] = (*state.limits, limit) if grows else state.limits, None
        elif grows:
            todo[name] = (limit,), state
    parts = {name: _ahead(limits[-1], state) for name, (limits, state) in todo.items()}
    with meter("tokenising", "tokens", parts=parts) as shown:
        for name, (limits, state) in todo.items():
            ledgers[name] = _read_domain(writer, config, name, ledgers, tokenizer, shown, limits, state)
            shown.end(name)


def _ahead(limit: Limit, state: DomainState | None) -> int | None:
    """Tokens to be read up to ``limit``, behind ``state``; None where the source's end is not known."""
    return None if limit is None else limit - (0 if state is None else state.source_tokens)


def _grows(state: DomainState, limit: Limit) -> bool:
    before = state.limits[-1]
    return not state.exhausted and before is not None and (limit is None or limit > before)


def _ledger(writer: Writer, name: str, state: DomainState) -> Ledger | None:
    packed = writer.read_ledger(name, len(state.limits))
    return None if packed is None else Ledger.unpack(packed)


def _read_domain(
    writer: Writer,
    config: BuildConfig,
    name: str,
    ledgers: Mapping[str, Ledger | None],
    tokenizer: "PreTrainedTokenizerBase",
    shown: Meter,
    limits: tuple[Limit, ...],
    state: DomainState | None,
) -> Ledger:
    """Read a source up to each of ``limits``, behind ``state``, and record how far it is then."""
    ledger, rows, intake, chosen = Ledger(), DomainRows(writer, name, state), Intake(), None
    known = ledgers[name]
    if state is not None:
        assert known is not None
        ledger, intake = known, _intake(state)
    elif known is not None:
        chosen = known.held_out  # of an earlier reading, when other domains may have held other documents
    others = {other: held for other, held in ledgers.items() if other != name and held is not None}
    for limit in limits:
        how = Splitting(
            seq_length=config.seq_length,
            validation_rows=config.validation_rows - rows.counts["validation"].rows,
            batch_rows=config.rows_per_shard,
            overlap=config.context,
            ledger=ledger,
            others=Others([*others.values(), ledger]),
            chosen=chosen,
        )
        domain = config.domains[name].model_copy(update={"max_tokens": limit})
        _read(rows, intake, domain, tokenizer, how, shown)
    rows.flush()
    validation = rows.counts["validation"]
    if not validation.rows and others:
        raise ConfigError(
            f"domains.{name}: nothing is left to validate on: what could be held out stands in the train "
            f"rows of {', '.join(others)} already; name {name} before these"
        )
    if not validation.labels:
        raise ConfigError(
            f"domains.{name}: no token of the validation split carries loss; raise validation_rows or "
            "seq_length"
        )
    read = limits if state is None else (*state.limits, *limits)
    writer.write_ledger(name, len(read), ledger.pack())
    writer.set_state(name, domain_state(rows, intake, read))
    return ledger


def _read(
    rows: "DomainRows",
    intake: Intake,
    domain: DomainConfig,
    tokenizer: "PreTrainedTokenizerBase",
    how: Splitting,
    shown: Meter,
) -> None:
    """Read the source up to ``max_tokens`` tokens, from where ``intake`` stands."""
    seen = intake.tokens
    taken = documents(
        rows.domain,
        domain,
        tokenizer,
        seed=rows.writer.manifest.seed,
        intake=intake,
        seq_length=how.seq_length,
    )
    for split, batch in split_rows(taken, how, intake):
        rows.add(split, batch)
        shown.advance(intake.tokens - seen, rows.domain)
        seen = intake.tokens


class DomainRows:
    """Gathers rows into shards and counts them; goes on behind the rows of ``state``."""

    def __init__(self, writer: Writer, domain: str, state: DomainState | None = None) -> None:
        self.writer = writer
        self.domain = domain
        empty = SplitState(rows=0, tokens=0, labels=0)
        self.counts: dict[Split, SplitState] = {
            split: empty if state is None else state.split(split) for split in SPLITS
        }
        self._waiting: dict[Split, Arrays | None] = {"train": None, "validation": None}
        for split, counts in self.counts.items():
            if counts.rows % writer.manifest.shard_rows:
                last = shards(counts.rows, writer.manifest.shard_rows) - 1
                self._waiting[split] = writer.read_tokens(domain, split, last)

    def add(self, split: Split, batch: RowBatch) -> None:
        """Count rows, and write each shard that is full with them."""
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
        if first + whole >= MOST_SHARDS:
            raise ConfigError(
                f"domains.{self.domain}: makes more than {MOST_SHARDS:,} shards: raise shard_tokens"
            )
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
        left_over=state.left_over,
    )


def domain_state(rows: DomainRows, intake: Intake, limits: tuple[Limit, ...]) -> DomainState:
    """What is recorded of a domain whose source was read up to the last of ``limits``."""
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
        held_out=None,
    )
