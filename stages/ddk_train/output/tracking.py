"""Write a run's JSON-lines files and its progress line, and log to trackers."""

import json
import os
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig

FILES = ("metrics.jsonl", "discrepancy.jsonl", "samples.jsonl")


class Tracker(NamedTuple):
    """The functions of an experiment tracker."""

    track: Callable[[Mapping[str, float], int], object]  # (values by name, step)
    finish: Callable[[int], object]  # (exit code)


def _tensorboard(config: TrainConfig, run_id: str, step: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # Hide steps after the checkpoint that an interrupted run has already logged.
    writer = SummaryWriter(os.path.join(config.output_dir, "tensorboard"), purge_step=step + 1)

    def track(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return Tracker(track, lambda code: writer.close())


def _wandb(config: TrainConfig, run_id: str, step: int) -> Tracker:
    import wandb

    try:
        run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "ddk-cache"),
            dir=config.output_dir,
            name=Path(config.output_dir).name,
            id=run_id,
            resume="allow",
            config=config.model_dump(mode="json"),
        )
    except wandb.Error as error:
        raise ConfigError(f"report_to: wandb: {error}") from error
    return Tracker(lambda values, step: run.log(dict(values), step=step), run.finish)


def _trackio(config: TrainConfig, run_id: str, step: int) -> Tracker:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "ddk-cache"),
        name=f"{Path(config.output_dir).name}-{run_id}",
        resume="allow",
        config=config.model_dump(mode="json"),
    )

    def finish(code: int) -> None:
        trackio.finish()  # type: ignore[no-untyped-call]

    return Tracker(lambda values, step: run.log(dict(values), step=step), finish)


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


def check_installed(trackers: Sequence[str]) -> None:
    """Raise ConfigError unless the packages of all ``trackers`` are installed."""
    for name in trackers:
        if find_spec(name) is None:
            raise ConfigError(f"report_to: the package {name} is not installed: pip install {name}")


class Records:
    """The JSON-lines files and the trackers of a run, a context manager; only the main process writes.

    On resume ``step`` is the checkpoint's, after which trackers continue, and ``sizes`` are the bytes of each
    JSON-lines file at that step: later lines are cut off.
    """

    def __init__(
        self, config: TrainConfig, run_id: str, step: int, sizes: Mapping[str, int], *, is_main: bool
    ):
        self._folder = Path(config.output_dir) if is_main else None
        self._trackers: list[Tracker] = []
        if self._folder:
            for name in FILES:
                with (self._folder / name).open("ab") as file:
                    file.truncate(sizes.get(name, 0))
            self._trackers = [TRACKERS[name](config, run_id, step) for name in config.report_to]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *rest: object) -> None:
        for tracker in self._trackers:
            tracker.finish(0 if error is None else 1)

    def metrics(self, line: Mapping[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        self._write("metrics.jsonl", line)
        values = {f"train/{name}": value for name, value in line.items() if name != "step"}
        self._track(values, int(line["step"]))

    def discrepancy(self, interval: int, step: int, domains: Sequence[str], **columns: ArrayLike) -> None:
        """Add a line to discrepancy.jsonl; ``columns`` are arrays over domains, [N]."""
        line: dict[str, Any] = {"interval": interval, "step": step}
        scalars: dict[str, float] = {}
        for name, values in columns.items():
            line[name] = dict(zip(domains, np.asarray(values).tolist(), strict=True))
            scalars |= {f"{name}/{domain}": value for domain, value in line[name].items()}
        self._write("discrepancy.jsonl", line)
        self._track(scalars, step)

    def generation(self, step: int, line: Mapping[str, str]) -> None:
        """Add a line to samples.jsonl."""
        self._write("samples.jsonl", {"step": step, **line})

    def sizes(self) -> dict[str, int]:
        """Return the bytes in each JSON-lines file."""
        return {name: (self._folder / name).stat().st_size for name in FILES} if self._folder else {}

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if self._folder:
            with (self._folder / name).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.track(values, step)


def progress_line(
    line: Mapping[str, float], max_steps: int, seconds_left: float, source: str, shares: Mapping[str, float]
) -> str:
    """Return ``step 120/3000  loss 2.345  12,345 tokens/s  1:23:45 left  factor code 0.31 prose 0.69``.

    ``source`` of the domains' ``shares`` is "factor" or "by size".
    """
    left = timedelta(seconds=round(seconds_left))
    return (
        f"step {line['step']}/{max_steps}  loss {line['loss']:.3f}  "
        f"{line['tokens_per_second']:,.0f} tokens/s  {left} left  "
        f"{source} {' '.join(f'{domain} {share:.2f}' for domain, share in shares.items())}"
    )
