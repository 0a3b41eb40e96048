"""Progress of long work: log lines by default, bars in a terminal or notebook, or a callback of the caller.

The library itself prints nothing: ``meter`` logs a line every ten seconds. The commands choose another
display with ``shown_by``, and so can a program::

    with shown_by(callback(lambda update: print(update.line()))):
        build_cache(config)
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines in a log
NOTEBOOK_SECONDS = 0.5  # between two updates of a notebook's line


@dataclass(frozen=True)
class Update:
    """The progress of some work, in its unit, and of the part that advanced."""

    name: str
    unit: str
    done: int
    total: int | None
    """None if the total is unknown."""
    part: str
    """The part that advanced; empty if the work has no parts."""
    part_done: int
    part_total: int | None
    seconds: float
    """Since the start."""
    finished: bool

    def line(self) -> str:
        """Return the progress as one line of text."""
        rate = self.done / max(self.seconds, 1e-3)
        if self.finished:
            return f"{self.name}: {self.done:,} {self.unit} in {clock(self.seconds)}, {rate:,.0f}/s"
        line = f"{self.name}: {self.done:,} {self.unit}, {rate:,.0f}/s"
        if self.total and self.done:
            left = (self.total - self.done) / rate
            line += f", {self.done / self.total:.0%} done, {clock(left)} left"
        if self.part:
            share = f"{self.part_done / self.part_total:.0%}" if self.part_total else f"{self.part_done:,}"
            line += f"; now {self.part}, {share}"
        return line


Callback = Callable[[Update], None]
Display = Callable[[], AbstractContextManager[Callback]]
"""Opened for each piece of work; receives every update until it is closed."""


class Meter:
    """Progress of one piece of work and its parts; made by ``meter``."""

    def __init__(self, name: str, unit: str, parts: Mapping[str, int | None], callback: Callback) -> None:
        self._name, self._unit, self._callback = name, unit, callback
        self._totals, self._done = dict(parts), dict.fromkeys(parts, 0)
        self._start = time.monotonic()

    def advance(self, amount: int, part: str = "") -> None:
        """Add ``amount`` to what is done of a part."""
        self._done[part] = self._done.get(part, 0) + amount
        self._update(part)

    def expect(self, parts: Mapping[str, int]) -> None:
        """Set the totals of parts that were unknown at the start."""
        self._totals |= parts

    def end(self, part: str = "") -> None:
        """End a part before its total: what is done becomes its total."""
        self._totals[part] = self._done.get(part, 0)
        self._update(part)

    def finish(self) -> None:
        """End all parts."""
        self._totals |= self._done
        self._update("", finished=True)

    def _update(self, part: str, *, finished: bool = False) -> None:
        totals = [total for total in self._totals.values() if total is not None]
        self._callback(
            Update(
                self._name,
                self._unit,
                done=sum(self._done.values()),
                total=sum(totals) if len(totals) == len(self._totals) else None,
                part=part if len(self._totals) > 1 else "",
                part_done=self._done.get(part, 0),
                part_total=self._totals.get(part),
                seconds=time.monotonic() - self._start,
                finished=finished,
            )
        )


@contextmanager
def meter(
    name: str, unit: str, total: int | None = None, *, parts: Mapping[str, int | None] | None = None
) -> Iterator[Meter]:
    """Measure the progress of a piece of work and report it to the current display.

    ``total`` is in ``unit``; None if it is unknown. ``parts`` gives a total for each part instead.
    """
    with (_display.get() or _default())() as callback:
        work = Meter(name, unit, {"": total} if parts is None else parts, callback)
        yield work
        work.finish()


@contextmanager
def shown_by(display: Display) -> Iterator[None]:
    """Report all progress inside to ``display``."""
    token = _display.set(display)
    try:
        yield
    finally:
        _display.reset(token)


_display: ContextVar[Display | None] = ContextVar("display", default=None)


def _default() -> Display:
    return notebook if "ipykernel" in sys.modules else lines(logger.info, LINE_SECONDS)


def callback(function: Callback) -> Display:
    """Return a display that calls ``function`` with every update."""
    return lambda: nullcontext(function)


def lines(write: Callable[[str], Any], seconds: float) -> Display:
    """Return a display that writes a line, at most one in so many seconds, and one at the end."""

    def display() -> AbstractContextManager[Callback]:
        last = time.monotonic()

        def show(update: Update) -> None:
            nonlocal last
            if update.finished or time.monotonic() - last >= seconds:
                last = time.monotonic()
                write(update.line())

        return nullcontext(show)

    return display


def notebook() -> AbstractContextManager[Callback]:
    """Show one line in a notebook's cell, updated in place."""
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lines(lambda line: handle.update({"text/plain": line}, raw=True), NOTEBOOK_SECONDS)()


def stderr() -> AbstractContextManager[Callback]:
    """Show bars on a terminal, else write lines to stderr: the display of the commands."""
    if not sys.stderr.isatty():
        return lines(lambda line: print(line, file=sys.stderr, flush=True), LINE_SECONDS)()
    from ddk_cache.bars import bars

    return bars()


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: "1:02:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
