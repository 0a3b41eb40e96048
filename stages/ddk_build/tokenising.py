"""The first half of stage one: the domains' texts become the token arrays, which are the list of work."""

from ddk_build.config import BuildConfig
from ddk_build.domain_reading import READING, DomainReading, Limit, ledger_name
from ddk_build.ledger import Ledger
from ddk_build.tokenisers import Tokenisers
from ddk_cache.layout import DomainState
from ddk_cache.progress import meter
from ddk_cache.writer import Writer


def tokenise(writer: Writer, config: BuildConfig, tokenisers: Tokenisers) -> None:
    """See that the cache has all tokens of every domain.

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
            reading = DomainReading(writer, config, name, ledgers, limits, state)
            ledgers[name] = reading.read(tokenisers, shown)
            shown.end(name)


def _ahead(limit: Limit, state: DomainState | None) -> int | None:
    """Tokens to be read up to ``limit``, behind ``state``; None where the source's end is not known."""
    return None if limit is None else limit - (0 if state is None else state.source_tokens)


def grows(state: DomainState, limit: Limit) -> bool:
    """Whether a domain goes on from its state to a ``max_tokens`` of ``limit``."""
    before = state.limits[-1]
    return not state.exhausted and before is not None and (limit is None or limit > before)


def _ledger(writer: Writer, name: str, state: DomainState) -> Ledger | None:
    packed = writer.read_own(name, ledger_name(len(state.limits)))
    return None if packed is None else Ledger.unpack(packed)
