"""How far long work is: share done, rate and time left, on a terminal or in a log."""

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.text import Text

LOG_SECONDS = 10.0  # between two lines where stderr is not a terminal


class _Rate(ProgressColumn):
    def __init__(self, unit: str) -> None:
        super().__init__()
        self._unit = unit

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:,.0f} {self._unit}/s")


class Meter:
    """Progress of one piece of work; made by ``meter``."""

    def __init__(self, progress: Progress, task: TaskID, name: str, unit: str) -> None:
        self._progress, self._task, self._name, self._unit = progress, task, name, unit
        self._logs = not progress.console.is_terminal
        self._said = self._start = time.monotonic()

    def advance(self, amount: int) -> None:
        """Say that ``amount`` more is done."""
        self._progress.advance(self._task, amount)
        if self._logs and time.monotonic() - self._said >= LOG_SECONDS:
            self._log()

    def finish(self) -> None:
        if self._logs:
            self._log()

    def _log(self) -> None:
        task = self._progress.tasks[self._task]
        self._said = time.monotonic()
        rate = task.completed / max(self._said - self._start, 1e-3)
        line = f"{self._name}: {task.completed:,.0f} {self._unit}, {rate:,.0f}/s"
        if task.total and task.completed:
            left = (task.total - task.completed) / max(rate, 1e-9)
            line += f", {task.completed / task.total:.0%} done, {_clock(left)} left"
        print(line, file=sys.stderr, flush=True)


@contextmanager
def meter(name: str, unit: str, total: int | None = None) -> Iterator[Meter]:
    """Show the progress of a piece of work: a live line on a terminal, else a line every ten seconds.

    ``total`` is in ``unit``; None where the end is not known.
    """
    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    progress = Progress(
        *columns, _Rate(unit), TimeRemainingColumn(), console=console, disable=not console.is_terminal
    )
    with progress:
        shown = Meter(progress, progress.add_task(name, total=total), name, unit)
        yield shown
        shown.finish()


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
