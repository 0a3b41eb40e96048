"""One domain's source read into its token shards, up to one limit after another, and kept on the way."""

import time
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256

from ddk_build.config import BuildConfig
from ddk_build.corpus import taken
from ddk_build.documents import Intake
from ddk_build.domain_rows import DomainRows
from ddk_build.holdout import Splitter, Splitting
from ddk_build.ledger import Ledger, Others
from ddk_build.reading import Reading
from ddk_build.tokenisers import Tokenisers
from ddk_cache.errors import ConfigError
from ddk_cache.layout import DomainState, digest
from ddk_cache.progress import Meter
from ddk_cache.writer import Writer

Limit = int | None  # max_tokens

READING = "reading"  # what a reading that is not at its end is kept as
KEEP_SECONDS = 30.0  # between two times that the state of a reading is kept


class DomainReading:
    """Reads a domain's source up to each of ``limits``, behind ``state``, and records how far it is then.

    ``ledgers``: of all domains, None for one that is not read yet.
    """

    def __init__(
        self,
        writer: Writer,
        config: BuildConfig,
        name: str,
        ledgers: Mapping[str, Ledger | None],
        limits: tuple[Limit, ...],
        state: DomainState | None,
    ) -> None:
        self._writer, self._config, self._name = writer, config, name
        self._limits, self._state = limits, state
        self._others = {other: held for other, held in ledgers.items() if other != name and held is not None}
        known, self._chosen, self._readings = ledgers[name], None, 0
        if state is not None:
            assert known is not None
            self._ledger, self._intake = known, _intake(state)
        else:
            self._ledger, self._intake = Ledger(), Intake()
            if known is not None:
                # By readings before, when other domains may have held other documents.
                self._chosen, self._readings = known.held_out, len(writer.existing_state(name).limits)

    def read(self, tokenisers: Tokenisers, shown: Meter) -> Ledger:
        """Do it, from where an interrupted reading was kept last."""
        kept = Reading.from_bytes(self._writer.read_blob(self._name, READING), self._plan)
        with DomainRows(self._writer, self._name, self._state) as rows:
            if kept is not None:
                self._ledger, self._intake = kept.ledger, kept.intake
                rows.counts, rows.waiting = kept.counts, kept.waiting
            for number in range(0 if kept is None else kept.done, len(self._limits)):
                self._read(rows, number, kept, tokenisers, shown)
                kept = None
            rows.flush()
        self._record(rows)
        return self._ledger

    def _read(
        self, rows: DomainRows, number: int, kept: Reading | None, tokenisers: Tokenisers, shown: Meter
    ) -> None:
        """Read up to a limit, from where ``intake`` stands; keep it now and then."""
        rows.settle()  # all of the readings before are counted
        intake, before = self._intake, self._ledger.copy() if kept is None else kept.before
        splitter = Splitter(
            Splitting(
                seq_length=self._config.seq_length,
                validation_rows=self._config.validation_rows - rows.counts["validation"].rows,
                overlap=self._config.context,
                ledger=self._ledger,
                others=Others([*self._others.values(), before]),
                chosen=self._chosen if number < self._readings else None,
            ),
            intake,
        )
        if kept is not None:
            splitter.unpack(kept.packed)
        domain = self._config.domains[self._name].model_copy(update={"max_tokens": self._limits[number]})
        found = tokenisers.documents(self._name, domain, intake.rows)
        seen, last = intake.tokens, time.monotonic()
        for documents in taken(self._name, domain, found, intake):
            rows.add("train", splitter.add(documents))
            shown.advance(intake.tokens - seen, self._name)
            seen = intake.tokens
            if time.monotonic() - last > KEEP_SECONDS:
                rows.settle()
                now = Reading(
                    self._plan,
                    number,
                    intake,
                    self._ledger,
                    before,
                    rows.counts,
                    rows.waiting,
                    splitter.pack(),
                )
                self._writer.write_blob(self._name, READING, now.to_bytes())
                last = time.monotonic()
        for split, row in splitter.finish():
            rows.add(split, [row])

    @cached_property
    def _plan(self) -> str:
        """The digest of all that decides what a reading makes of a source."""
        return digest(
            {
                "binding": self._writer.manifest.fingerprint(self._name),
                "validation_rows": self._config.validation_rows,
                "limits": self._limits,
                "state": None if self._state is None else self._state.model_dump(mode="json"),
                "chosen": None if self._chosen is None else sorted(self._chosen),
                "others": {
                    other: sha256(ledger.pack()).hexdigest() for other, ledger in self._others.items()
                },
            }
        )

    def _record(self, rows: DomainRows) -> None:
        validation = rows.counts["validation"]
        if not validation.rows and rows.counts["train"].rows and self._others:
            raise ConfigError(
                f"domains.{self._name}: nothing is left to validate on: what could be held out stands in the "
                f"train rows of {', '.join(self._others)} already; name {self._name} before these"
            )
        if not validation.labels:
            raise ConfigError(
                f"domains.{self._name}: no token of the validation split carries loss; raise validation_rows "
                "or seq_length"
            )
        limits = self._limits if self._state is None else (*self._state.limits, *self._limits)
        self._writer.write_blob(self._name, ledger_name(len(limits)), self._ledger.pack())
        self._writer.set_state(self._name, domain_state(rows, self._intake, limits))
        self._writer.write_blob(self._name, READING, None)


def ledger_name(limits: int) -> str:
    """What a domain's ledger is kept as, after so many readings of its source."""
    return f"documents-{limits}"


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
