"""How far long work is: share done, rate and time left, on a terminal or in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

LOG_SECONDS = 10.0  # between two lines where stderr is not a terminal


class Meter:
    """Progress of one piece of work, as a whole and by its parts; made by ``meter``."""

    def __init__(self, progress: Progress, name: str, unit: str, parts: Mapping[str, int | None]) -> None:
        self._progress, self._name, self._unit, self._foreseen = progress, name, unit, dict(parts)
        self._logs = not progress.console.is_terminal
        self._said = self._start = time.monotonic()
        self._whole = progress.add_task(name, total=self._total())
        self._tasks: dict[str, TaskID] = {}

    def advance(self, amount: int, part: str = "") -> None:
        """Say that ``amount`` more is done, of that part."""
        self._progress.advance(self._whole, amount)
        if len(self._foreseen) > 1:
            self._progress.advance(self._task(part), amount)
        finished = self._progress.tasks[self._whole].finished  # which is said in a line of its own
        if self._logs and not finished and time.monotonic() - self._said >= LOG_SECONDS:
            self._log(part)

    def expect(self, parts: Mapping[str, int]) -> None:
        """Say how much these parts hold, which were not known when it began."""
        self._foreseen |= parts
        self._progress.update(self._whole, total=self._total())

    def end(self, part: str = "") -> None:
        """Say that a part holds no more, whatever was foreseen: its bar, and the whole's, are right then."""
        if len(self._foreseen) > 1:
            task = self._task(part)  # first: the list of tasks is a copy
            done = self._progress.tasks[task].completed
            self._progress.update(task, total=done)
        else:
            done = self._progress.tasks[self._whole].completed
        self._foreseen[part] = int(done)
        self._progress.update(self._whole, total=self._total())

    def finish(self) -> None:
        """Say what was done, in how much time."""
        for task in self._progress.tasks:
            self._progress.update(task.id, total=task.completed)
        if self._logs:
            done, seconds = self._progress.tasks[self._whole].completed, time.monotonic() - self._start
            self._print(f"{done:,.0f} {self._unit} in {_clock(seconds)}, {done / max(seconds, 1e-3):,.0f}/s")

    def _total(self) -> int | None:
        foreseen = [part for part in self._foreseen.values() if part is not None]
        return sum(foreseen) if len(foreseen) == len(self._foreseen) else None

    def _task(self, part: str) -> TaskID:
        if part not in self._tasks:
            self._tasks[part] = self._progress.add_task(f"  {part}", total=self._foreseen[part])
        return self._tasks[part]

    def _log(self, part: str) -> None:
        task = self._progress.tasks[self._whole]
        self._said = time.monotonic()
        rate = task.completed / (self._said - self._start)
        line = f"{task.completed:,.0f} {self._unit}, {rate:,.0f}/s"
        if task.total and task.completed:
            left = (task.total - task.completed) / rate
            line += f", {task.completed / task.total:.0%} done, {_clock(left)} left"
        if part in self._tasks:
            now = self._progress.tasks[self._tasks[part]]
            line += f"; now {part}, {f'{now.percentage:.0f}%' if now.total else f'{now.completed:,.0f}'}"
        self._print(line)

    def _print(self, line: str) -> None:
        print(f"{self._name}: {line}", file=sys.stderr, flush=True)


@contextmanager
def meter(
    name: str, unit: str, total: int | None = None, *, parts: Mapping[str, int | None] | None = None
) -> Iterator[Meter]:
    """Show the progress of a piece of work: live bars on a terminal, else a line every ten seconds.

    ``total`` is in ``unit``; None where the end is not known. ``parts`` has it by part instead, and each
    gets a bar of its own below the whole's once it begins.
    """
    console = Console(stderr=True)
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Column(lambda task: f"{task.percentage:.0f}%" if task.total else ""),
        _Column(lambda task: f"{task.completed:,.0f} {unit}"),
        _Column(lambda task: f"{_rate(task):,.0f}/s"),
        _Column(_time),
        console=console,
        disable=not console.is_terminal,
    )
    with progress if console.is_terminal else nullcontext():  # rich before 14 ends it with an empty line
        shown = Meter(progress, name, unit, {"": total} if parts is None else parts)
        yield shown
        shown.finish()


class _Column(ProgressColumn):
    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), justify="right")


def _rate(task: Task) -> float:
    """Of late; of all the time once the task is finished."""
    if task.finished_time:
        return task.completed / task.finished_time
    return task.speed or 0.0


def _time(task: Task) -> str:
    if task.finished:
        return f"in {_clock(task.finished_time or 0.0)}"
    return "" if task.time_remaining is None else f"{_clock(task.time_remaining)} left"


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}"
