"""Progress bars on a terminal, with rich."""

from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from ddk_cache.progress import Update, clock


class Bars:
    """A callback that shows a bar for the whole work, and below it one for each part that has begun."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, update: Update) -> None:
        if self._progress is None:
            self._progress, self._tasks = _progress(update.unit), {}
            self._progress.start()
        shown = {update.name: (update.done, update.total)}
        if update.part:
            shown[f"  {update.part}"] = (update.part_done, update.part_total)
        for name, (done, total) in shown.items():
            if name not in self._tasks:
                self._tasks[name] = self._progress.add_task(name, total=total)
            self._progress.update(self._tasks[name], completed=done, total=total)
        if update.state == "finished":
            for task in self._progress.tasks:
                self._progress.update(task.id, total=task.completed)
        if update.state != "running":
            self._progress.stop()
            self._progress = None


def _progress(unit: str) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        _Column(lambda task: f"{task.percentage:.0f}%" if task.total else ""),
        _Column(lambda task: f"{task.completed:,.0f} {unit}"),
        _Column(lambda task: f"{_rate(task):,.0f}/s"),
        _Column(_time),
        console=Console(stderr=True),
    )


class _Column(ProgressColumn):
    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), justify="right")


def _rate(task: Task) -> float:
    """Return the recent rate; for a finished task, that of the whole time."""
    return task.completed / task.finished_time if task.finished_time else task.speed or 0.0


def _time(task: Task) -> str:
    if task.finished:
        return f"in {clock(task.finished_time or 0.0)}"
    return "" if task.time_remaining is None else f"{clock(task.time_remaining)} left"
