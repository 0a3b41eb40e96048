"""Progress bars on a terminal, with rich."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from ddk_cache.util.progress import Update


class Bars:
    """A callback that shows a bar for all of the work, and below it a bar for each part that has begun."""

    def __init__(self) -> None:
        self._progress: Progress | None = None
        self._tasks: dict[str, TaskID] = {}

    def __call__(self, update: Update) -> None:
        if self._progress is None:
            self._tasks = {}
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(justify="right"),
                TextColumn(f"{{task.completed:,.0f}} {update.unit}", justify="right"),
                _Rate(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
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


class _Rate(ProgressColumn):
    """The recent rate; for a finished task, that of the whole time."""

    def render(self, task: Task) -> Text:
        rate = task.completed / task.finished_time if task.finished_time else task.speed or 0.0
        return Text(f"{rate:,.0f}/s", justify="right")
