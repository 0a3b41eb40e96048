"""Progress bars on a terminal, with rich."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn
from rich.text import Text

from ddk_cache.progress import Callback, Update, clock


@contextmanager
def bars() -> Iterator[Callback]:
    """Show a bar for the whole work, and below it one for each part that has begun."""
    unit = ""
    tasks: dict[str, TaskID] = {}
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        Column(lambda task: f"{task.percentage:.0f}%" if task.total else ""),
        Column(lambda task: f"{task.completed:,.0f} {unit}"),
        Column(lambda task: f"{_rate(task):,.0f}/s"),
        Column(_time),
        console=Console(stderr=True),
    )

    def show(update: Update) -> None:
        nonlocal unit
        unit = update.unit
        shown = {update.name: (update.done, update.total)}
        if update.part:
            shown[f"  {update.part}"] = (update.part_done, update.part_total)
        for name, (done, total) in shown.items():
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=total)
            progress.update(tasks[name], completed=done, total=total)
        if update.finished:
            for task in progress.tasks:
                progress.update(task.id, total=task.completed)

    with progress:
        yield show


class Column(ProgressColumn):
    """Text from a function of the task."""

    def __init__(self, text: Callable[[Task], str]) -> None:
        super().__init__()
        self._text = text

    def render(self, task: Task) -> Text:
        return Text(self._text(task), justify="right")


def _rate(task: Task) -> float:
    """Return the recent rate; for a finished task, that of the whole time."""
    if task.finished_time:
        return task.completed / task.finished_time
    return task.speed or 0.0


def _time(task: Task) -> str:
    if task.finished:
        return f"in {clock(task.finished_time or 0.0)}"
    return "" if task.time_remaining is None else f"{clock(task.time_remaining)} left"
