"""What a run says of itself: JSON-lines files, a progress line, and trackers."""

import json
import os
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import IO, Any

from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig

FILES = ("metrics.jsonl", "discrepancy.jsonl")
Track = Callable[[Mapping[str, float], int], object]  # (values by name, step)


def _tensorboard(config: TrainConfig, run_id: str, step: int) -> tuple[Track, Callable[[], object]]:
    from torch.utils.tensorboard import SummaryWriter

    # What an interrupted run wrote after its last checkpoint is hidden: it comes again.
    writer = SummaryWriter(os.path.join(config.output_dir, "tensorboard"), purge_step=step + 1)

    def track(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    return track, writer.close


def _wandb(config: TrainConfig, run_id: str, step: int) -> tuple[Track, Callable[[], object]]:
    import wandb

    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", "ddk-cache"),
        dir=config.output_dir,
        name=Path(config.output_dir).name,
        id=run_id,
        resume="allow",
        config=config.model_dump(mode="json"),
    )
    return lambda values, step: run.log(dict(values), step=step), run.finish


def _trackio(config: TrainConfig, run_id: str, step: int) -> tuple[Track, Callable[[], object]]:
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", "ddk-cache"),
        name=f"{Path(config.output_dir).name}-{run_id}",
        resume="allow",
        config=config.model_dump(mode="json"),
    )
    return lambda values, step: run.log(dict(values), step=step), trackio.finish


TRACKERS = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio}


class Records:
    """The JSON-lines files and the trackers of a run; only the main process writes.

    Parameters
    ----------
    config, run_id
        The run, and what trackers know it by.
    step
        Steps done already; trackers go on after it.
    sizes
        Bytes of each JSON-lines file to keep: what stood there at the checkpoint. The rest comes again.

    Raises
    ------
    ConfigError
        A tracker's package is not installed.
    """

    def __init__(
        self, config: TrainConfig, run_id: str, step: int, sizes: Mapping[str, int], *, is_main: bool
    ):
        self._files: dict[str, IO[str]] = {}
        self._trackers: list[tuple[Track, Callable[[], object]]] = []
        if not is_main:
            return
        for name in FILES:
            self._files[name] = (Path(config.output_dir) / name).open("a", encoding="utf-8")
            self._files[name].truncate(sizes.get(name, 0))
        for name in config.report_to:
            try:
                self._trackers.append(TRACKERS[name](config, run_id, step))
            except ImportError as error:
                raise ConfigError(f"report_to: {name} is not installed: {error}") from error

    def metrics(self, line: Mapping[str, float]) -> None:
        """Add a line to metrics.jsonl."""
        self._write("metrics.jsonl", line)
        self._track(
            {f"train/{name}": value for name, value in line.items() if name != "step"}, int(line["step"])
        )

    def discrepancy(self, line: Mapping[str, Any]) -> None:
        """Add a line to discrepancy.jsonl."""
        self._write("discrepancy.jsonl", line)
        maps = {name: value for name, value in line.items() if isinstance(value, Mapping)}
        values = {
            f"{name}/{domain}": v for name, by_domain in maps.items() for domain, v in by_domain.items()
        }
        self._track(values, int(line["step"]))

    def sizes(self) -> dict[str, int]:
        """Bytes in each JSON-lines file."""
        return {name: file.tell() for name, file in self._files.items()}

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        for _, finish in self._trackers:
            finish()

    def _write(self, name: str, line: Mapping[str, Any]) -> None:
        if name in self._files:
            self._files[name].write(json.dumps(line) + "\n")
            self._files[name].flush()

    def _track(self, values: Mapping[str, float], step: int) -> None:
        for track, _ in self._trackers:
            track(values, step)


def progress_line(
    line: Mapping[str, float], max_steps: int, seconds_left: float, factor: Mapping[str, float]
) -> str:
    """``step 120/3000  loss 2.345  12,345 tokens/s  1:23:45 left  code 0.31 prose 0.69``."""
    shares = " ".join(f"{domain} {share:.2f}" for domain, share in factor.items())
    left = timedelta(seconds=round(seconds_left))
    return (
        f"step {line['step']}/{max_steps}  loss {line['loss']:.3f}  "
        f"{line['tokens_per_second']:,.0f} tokens/s  {left} left  factor {shares}"
    )
