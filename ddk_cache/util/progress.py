"""Progress of long work: log lines, bars in the commands, a line in notebooks, or a callback.

Inside ``with shown_by(callback):`` every update goes to ``callback``; ``Update.line`` is its text.
"""

import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

logger = logging.getLogger(__name__)

LINE_SECONDS = 10.0  # between two lines in a log
NOTEBOOK_SECONDS = 0.5  # between two updates of a notebook's line


@dataclass(frozen=True)
class Update:
    """The progress of some work, in its unit, and of the part that advanced last."""

    name: str
    unit: str
    done: int
    total: int | None  # None if unknown
    part: str  # empty if the work has one part only
    part_done: int
    part_total: int | None
    seconds: float  # since the start
    state: Literal["running", "finished", "failed"]

    def line(self) -> str:
        """Return the progress as one line of text."""
        rate = self.done / max(self.seconds, 1e-3)
        if self.state == "finished" and self.seconds < 1:  # too short for a rate
            return f"{self.name}: {self.done:,} {self.unit}"
        if self.state == "finished":
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
_callback: ContextVar[Callback | None] = ContextVar("callback", default=None)


@contextmanager
def shown_by(callback: Callback) -> Iterator[None]:
    """Pass every update of the work inside to ``callback``."""
    token = _callback.set(callback)
    try:
        yield
    finally:
        _callback.reset(token)


@contextmanager
def logged_on_stderr(name: str) -> Iterator[None]:
    """Write the log of a package to stderr, from the level of information on."""
    package, handler = logging.getLogger(name), _StderrHandler()
    level = package.level
    package.addHandler(handler)
    package.setLevel(logging.INFO)
    try:
        yield
    finally:
        package.removeHandler(handler)
        package.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes to the current ``sys.stderr``, which a bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        print(self.format(record), file=sys.stderr)


class Meter:
    """Progress of one piece of work and its parts; made by ``meter``."""

    def __init__(self, name: str, unit: str, parts: Mapping[str, int | None], callback: Callback) -> None:
        self._name, self._unit, self._callback = name, unit, callback
        self._totals, self._done = dict(parts), dict.fromkeys(parts, 0)
        self._start = time.monotonic()

    def advance(self, amount: int, part: str = "") -> None:
        """Add ``amount`` to the progress of a part."""
        self._done[part] = self._done.get(part, 0) + amount
        self.report(part)

    def expect(self, total: int, part: str = "") -> None:
        """Change the total of a part, for work that learns on its way how much it is."""
        self._totals[part] = total

    def end(self, part: str = "") -> None:
        """End a part early: its total becomes its progress."""
        self._totals[part] = self._done.get(part, 0)
        self.report(part)

    def report(self, part: str = "", state: Literal["running", "finished", "failed"] = "running") -> None:
        """Pass the progress to the callback; finished work has done its total."""
        if state == "finished":
            self._totals |= self._done
        totals = [total for total in self._totals.values() if total is not None]
        update = Update(
            self._name,
            self._unit,
            done=sum(self._done.values()),
            total=sum(totals) if len(totals) == len(self._totals) else None,
            part=part if len(self._totals) > 1 else "",
            part_done=self._done.get(part, 0),
            part_total=self._totals.get(part),
            seconds=time.monotonic() - self._start,
            state=state,
        )
        self._callback(update)


@contextmanager
def meter(
    name: str, unit: str, total: int | None = None, *, parts: Mapping[str, int | None] | None = None
) -> Iterator[Meter]:
    """Measure the progress of a piece of work.

    ``total`` is in ``unit``; None if it is unknown. ``parts`` gives a total for each part instead.
    """
    work = Meter(name, unit, {"": total} if parts is None else parts, _callback.get() or _default())
    try:
        yield work
    except BaseException:
        work.report(state="failed")
        raise
    work.report(state="finished")


def lines(write: Callable[[str], Any], seconds: float) -> Callback:
    """Return a callback that writes a line at most once in ``seconds``, and at the end."""
    last = 0.0  # of ``Update.seconds``

    def show(update: Update) -> None:
        nonlocal last
        is_due = update.seconds - last >= seconds
        if update.state == "finished" or (update.state == "running" and is_due):
            write(update.line())
            last = update.seconds
        if update.state != "running":
            last = 0.0

    return show


def _default() -> Callback:
    """Return one line that is updated in place, in a notebook; else lines in the log."""
    if "ipykernel" not in sys.modules:
        return lines(logger.info, LINE_SECONDS)
    from IPython.display import display

    handle = display({"text/plain": ""}, raw=True, display_id=True)
    return lines(lambda line: handle.update({"text/plain": line}, raw=True), NOTEBOOK_SECONDS)


def clock(seconds: float) -> str:
    """Return seconds as hours, minutes and seconds: "1:02:03"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
