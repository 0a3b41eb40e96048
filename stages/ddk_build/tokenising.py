"""The first half of stage one: the domains' texts become the token arrays, which are the list of work."""

import time
from collections import Counter
from collections.abc import Callable, Generator, Mapping
from hashlib import sha256

from ddk_build.config import BuildConfig, DomainConfig
from ddk_build.corpus import taken
from ddk_build.documents import Intake
from ddk_build.domain_rows import DomainRows
from ddk_build.holdout import Splitter, Splitting
from ddk_build.ledger import Ledger, Others
from ddk_build.reading import Reading
from ddk_build.tokenisers import Tokenisers
from ddk_cache.errors import ConfigError
from ddk_cache.layout import DomainState, digest
from ddk_cache.progress import Meter, meter
from ddk_cache.writer import Writer

Limit = int | None  # max_tokens

READING = "reading"  # what a reading that is not at its end is kept as
KEEP_SECONDS = 30.0  # between two times that the state of a reading is kept


def tokenise(writer: Writer, config: BuildConfig, tokenisers: Tokenisers) -> Generator[str, None, None]:
    """See that the cache has all tokens of every domain; yields each domain that has them.

    Nothing happens where they are there. A domain whose ``max_tokens`` was raised goes on where its source
    was left; while it has fewer validation rows than it should, these grow too. One with damaged tokens is
    read anew, and the same bytes come out; an interrupted reading goes on where it was kept last.

    Raises
    ------
    ConfigError
        A source cannot be read, lacks the column, or has no text; or nothing held out carries loss.
    CacheError
        A source has changed since the cache was built.
    """
    states = {name: writer.state(name) for name in config.domains}
    whole = {name: state is not None and writer.has_tokens(name) for name, state in states.items()}
    done = [
        name
        for name, state in states.items()
        if state is not None and whole[name] and not grows(state, config.domains[name].max_tokens)
    ]
    for name in done:
        writer.write_own(name, READING, None)  # a kill may have come between the state and this
        yield name
    if len(done) == len(states):
        return
    ledgers = {
        name: None if state is None else _ledger(writer, name, state) for name, state in states.items()
    }
    # Small ones first: they could hold out nothing if a large one trained on all they have.
    todo: dict[str, tuple[tuple[Limit, ...], DomainState | None]] = {}
    for name in sorted(config.domains, key=lambda name: config.domains[name].max_tokens or float("inf")):
        state, limit = states[name], config.domains[name].max_tokens
        goes_on = state is not None and grows(state, limit)
        if state is None:
            todo[name] = (limit,), None
        elif ledgers[name] is None or not whole[name]:
            todo[name] = (*state.limits, limit) if goes_on else state.limits, None
        elif goes_on:
            todo[name] = (limit,), state
    parts = {name: _ahead(limits[-1], state) for name, (limits, state) in todo.items()}
    with meter("tokenising", "tokens", parts=parts) as shown:
        for name, (limits, state) in todo.items():
            ledgers[name] = _read_domain(writer, config, name, ledgers, tokenisers, shown, limits, state)
            shown.end(name)
            if name not in done:
                yield name


def _ahead(limit: Limit, state: DomainState | None) -> int | None:
    """Tokens to be read up to ``limit``, behind ``state``; None where the source's end is not known."""
    return None if limit is None else limit - (0 if state is None else state.source_tokens)


def ledger_name(limits: int) -> str:
    """What a domain's ledger is kept as, after so many readings of its source."""
    return f"documents-{limits}"


def grows(state: DomainState, limit: Limit) -> bool:
    """Whether a domain goes on from its state to a ``max_tokens`` of ``limit``."""
    before = state.limits[-1]
    return not state.exhausted and before is not None and (limit is None or limit > before)


def _ledger(writer: Writer, name: str, state: DomainState) -> Ledger | None:
    packed = writer.read_own(name, ledger_name(len(state.limits)))
    return None if packed is None else Ledger.unpack(packed)


def _read_domain(
    writer: Writer,
    config: BuildConfig,
    name: str,
    ledgers: Mapping[str, Ledger | None],
    tokenisers: Tokenisers,
    shown: Meter,
    limits: tuple[Limit, ...],
    state: DomainState | None,
) -> Ledger:
    """Read a source up to each of ``limits``, behind ``state``, and record how far it is then."""
    known, chosen = ledgers[name], None
    if state is None and known is not None:
        chosen = known.held_out  # of an earlier reading, when other domains may have held other documents
    others = {other: held for other, held in ledgers.items() if other != name and held is not None}
    plan = _plan(writer, config, name, others, limits, state, chosen)
    kept = Reading.from_bytes(writer.read_own(name, READING), plan)
    if kept is not None:
        ledger, intake = kept.ledger, kept.intake
    elif state is not None:
        assert known is not None
        ledger, intake = known, _intake(state)
    else:
        ledger, intake = Ledger(), Intake()
    with DomainRows(writer, name, state) as rows:
        if kept is not None:
            rows.counts, rows.waiting = kept.counts, kept.waiting
        for number, limit in enumerate(limits):
            if kept is not None and number < kept.done:
                continue
            goes_on = kept is not None and number == kept.done
            before = kept.before if kept is not None and goes_on else ledger.copy()
            how = Splitting(
                seq_length=config.seq_length,
                validation_rows=config.validation_rows - rows.counts["validation"].rows,
                overlap=config.context,
                ledger=ledger,
                others=Others([*others.values(), before]),
                chosen=chosen,
            )
            splitter = Splitter(how, intake)
            if kept is not None and goes_on:
                splitter.unpack(kept.packed)

            def keep(splitter: Splitter = splitter, number: int = number, before: Ledger = before) -> None:
                rows.settle()
                now = Reading(
                    plan, number, intake, ledger, before, rows.counts, rows.waiting, splitter.pack()
                )
                writer.write_own(name, READING, now.to_bytes())

            domain = config.domains[name].model_copy(update={"max_tokens": limit})
            _read(rows, intake, domain, tokenisers, splitter, keep, shown)
        rows.flush()
    _check_validation(name, rows, others)
    read = limits if state is None else (*state.limits, *limits)
    writer.write_own(name, ledger_name(len(read)), ledger.pack())
    writer.set_state(name, domain_state(rows, intake, read))
    writer.write_own(name, READING, None)
    return ledger


def _plan(
    writer: Writer,
    config: BuildConfig,
    name: str,
    others: Mapping[str, Ledger],
    limits: tuple[Limit, ...],
    state: DomainState | None,
    chosen: set[int] | None,
) -> str:
    """The digest of all that decides what a reading makes of a source."""
    return digest(
        {
            "binding": writer.manifest.binding(name),
            "validation_rows": config.validation_rows,
            "limits": limits,
            "state": None if state is None else state.model_dump(mode="json"),
            "chosen": None if chosen is None else sorted(chosen),
            "others": {other: sha256(ledger.pack()).hexdigest() for other, ledger in others.items()},
        }
    )


def _check_validation(name: str, rows: DomainRows, others: Mapping[str, Ledger]) -> None:
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


def _read(
    rows: DomainRows,
    intake: Intake,
    domain: DomainConfig,
    tokenisers: Tokenisers,
    splitter: Splitter,
    keep: Callable[[], None],
    shown: Meter,
) -> None:
    """Read the source up to ``max_tokens`` tokens, from where ``intake`` stands; ``keep`` it now and then."""
    seen, kept = intake.tokens, time.monotonic()
    found = tokenisers.documents(rows.domain, domain, intake.rows)
    for documents in taken(rows.domain, domain, found, intake):
        rows.add("train", [row for document in documents for row in splitter.add(document)])
        shown.advance(intake.tokens - seen, rows.domain)
        seen = intake.tokens
        if time.monotonic() - kept > KEEP_SECONDS:
            keep()
            kept = time.monotonic()
    for split, row in splitter.finish():
        rows.add(split, [row])


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
