"""Write a run's JSON-lines files and its progress line, and log to trackers."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, BinaryIO, NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict, Field

from ddk_cache.errors import ConfigError
from ddk_cache.util import durable
from ddk_train.config import TrainConfig
from ddk_train.errors import TrainingError, writing

FILES = ("metrics.jsonl", "discrepancy.jsonl", "samples.jsonl")
LONGEST_LINE = 1 << 20  # bytes


class LogState(BaseModel):
    """The length of a JSON-lines file at a checkpoint, and the digest of that part."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    bytes: Annotated[int, Field(ge=0, lt=1 << 53)]
    sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


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
            project=config.project or os.environ.get("WANDB_PROJECT", "ddk-cache"),
            dir=config.output_dir,
            name=config.run_name or Path(config.output_dir).name,
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
        project=config.project or os.environ.get("TRACKIO_PROJECT", "ddk-cache"),
        name=f"{config.run_name or Path(config.output_dir).name}-{run_id}",
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

    On resume ``step`` is the checkpoint's, after which trackers continue, and ``files`` are the states of the
    JSON-lines files at that step: later lines are cut off. Where lines are missing or damaged, complete
    lines are kept and ``log`` gets a warning.
    """

    def __init__(
        self,
        config: TrainConfig,
        run_id: str,
        step: int,
        files: Mapping[str, LogState],
        log: Callable[[str], None] | None,  # None: not the main process
    ):
        self._folder = Path(config.output_dir) if log else None
        self._trackers: list[Tracker] = []
        self._states: dict[str, tuple[int, Any]] = {}  # bytes and sha256 of each file
        if self._folder and log:
            for name in FILES:
                with writing(self._folder / name):
                    self._states[name] = _cut(self._folder / name, files.get(name), step, log)
            for name in config.report_to:  # the folder into which a tracker writes
                if (self._folder / name).is_symlink():
                    raise TrainingError(f"{self._folder / name}: is a link; nothing is written through it")
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
        """Add a line to discrepancy.jsonl; ``columns`` are arrays over domains, [N]. NaN becomes null."""
        line: dict[str, Any] = {"interval": interval, "step": step}
        scalars: dict[str, float] = {}
        for name, values in columns.items():
            by_domain = dict(zip(domains, np.asarray(values).tolist(), strict=True))
            known = {domain: value for domain, value in by_domain.items() if not math.isnan(value)}
            line[name] = dict.fromkeys(domains) | known
            scalars |= {f"{name}/{domain}": value for domain, value in known.items()}
        self._write("discrepancy.jsonl", line)
        self._track(scalars, step)

    def generation(self, step: int, line: Mapping[str, str]) -> None:
        """Add a line to samples.jsonl."""
        self._write("samples.jsonl", {"step": step, **line})

    def state(self) -> dict[str, dict[str, Any]]:
        """Flush the JSON-lines files to disk, which a checkpoint counts on, and return their states."""
        for name in self._states:
            durable.sync(Path(self._folder or "", name))
        return {
            name: LogState(bytes=size, sha256=digest.hexdigest()).model_dump()
            for name, (size, digest) in self._states.items()
        }

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if self._folder:
            data = (json.dumps(line) + "\n").encode()
            durable.append(self._folder / name, data)
            size, digest = self._states[name]
            digest.update(data)
            self._states[name] = size + len(data), digest

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for tracker in self._trackers:
            tracker.track(values, step)


def _cut(path: Path, state: LogState | None, step: int, log: Callable[[str], None]) -> tuple[int, Any]:
    """Cut a JSON-lines file to its length at a checkpoint; return its bytes and sha256.

    If it is shorter or has other bytes, keep the complete lines and log it.
    """
    expected = state.bytes if state else 0
    with open(durable.open_regular(path, os.O_RDWR | os.O_CREAT), "r+b") as file:
        size, digest = min(expected, file.seek(0, os.SEEK_END)), _digest(file, expected)
        if state and digest.hexdigest() != state.sha256:
            file.seek(max(size - LONGEST_LINE, 0))
            tail = file.read(min(size, LONGEST_LINE))
            size -= len(tail) - (tail.rfind(b"\n") + 1)
            missing = expected - size
            problem = f"{missing:,} bytes are missing" if missing else "some bytes are damaged"
            log(f"{path}: of the lines up to step {step:,}, {problem}; the others are kept")
            digest = _digest(file, size)
        file.truncate(size)
    return size, digest


def damaged_logs(folder: Path, files: Mapping[str, LogState]) -> Iterator[str]:
    """Yield a line for each JSON-lines file that is not as it was at a checkpoint."""
    for name, state in files.items():
        try:
            with open(durable.open_regular(folder / name, os.O_RDONLY), "rb") as file:
                if _digest(file, state.bytes).hexdigest() != state.sha256:
                    yield f"{name}: is damaged: not what was written before the newest checkpoint"
        except OSError as error:
            yield f"{name}: {error.strerror}"


def _digest(file: BinaryIO, size: int) -> Any:
    """Return the sha256 of the first ``size`` bytes."""
    digest = hashlib.sha256()
    file.seek(0)
    while chunk := file.read(min(size, 1 << 20)):
        digest.update(chunk)
        size -= len(chunk)
    return digest


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
