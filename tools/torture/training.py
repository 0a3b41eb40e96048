"""Training, report and export under torture."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import deserialize

from ddk_cache.cache.reader import open_cache
from ddk_cache.export.writer import Export
from ddk_train.config import TrainConfig
from ddk_train.output.folder import is_run
from ddk_train.output.sums import SUMS
from ddk_train.output.verify import verify
from ddk_train.report.page import write_report
from ddk_train.train import train
from tools.torture.subject import Build, Objects, Subject

TIMES = ("tokens_per_second", "data_wait_fraction", "began", "ended")


class Training(Subject):
    """``ddk-cache train``, with ``--resume`` once there is a run: full weights, checkpoints and the best."""

    def __init__(self, folder: Path, build: Build, **changes: Any) -> None:
        self.build, self._changes = build, changes
        self.sources = (build.reference, build.teacher)
        super().__init__(folder)

    def run(self, output: str) -> None:
        """Train, or resume."""
        self.train(output)

    def train(self, output: str, **changes: Any) -> None:
        """Train with changes to the configuration, or resume."""
        keys: dict[str, Any] = {
            "cache": str(self.build.reference),
            "student": str(self.build.teacher),
            "output_dir": output,
            "distill_interval": 2,
            "max_steps": 5,
            "per_device_train_batch_size": 2,
            "learning_rate": 3e-3,
            "min_learning_rate": 3e-4,
            "warmup_steps": 1,
            "bf16": False,
            "logging_steps": 1,
            "save_steps": 2,
            "sample_tokens": 4,
            "keep_best": True,
            "report_to": "none",
        }
        train(TrainConfig.model_validate(keys | self._changes | changes), resume=is_run(Path(output)))

    def comparable(self, objects: Objects) -> Mapping[str, Any]:
        """Leave out times, in checkpoints the run's id, and checkpoints that could not be read."""
        return {
            key: _untimed(key, data)
            for key, data in objects.items()
            if not key.endswith(SUMS) and not key.startswith("damaged-")
        }

    def damage(self, output: str) -> Iterable[str]:
        """Verify the run."""
        return verify(output) or ["is not a run"]


class Report(Subject):
    """``ddk-cache report`` on a finished run."""

    def __init__(self, folder: Path, training: Training) -> None:
        self.sources = (training.reference,)
        super().__init__(folder)

    def begin(self) -> None:
        """Make the folder for the page."""
        super().begin()
        self.output.mkdir()

    def run(self, output: str) -> None:
        """Write the page."""
        write_report([*self.sources], Path(output, "report.html"))


class Exporting(Subject):
    """``ddk-cache export``."""

    def __init__(self, folder: Path, build: Build) -> None:
        self.sources = (build.reference,)
        super().__init__(folder)

    def run(self, output: str) -> None:
        """Export, or resume."""
        for _ in Export(open_cache(*self.sources), Path(output), "parquet").write():
            pass


def _untimed(key: str, data: bytes) -> Any:
    if key.endswith(".jsonl"):
        return [without(json.loads(line), TIMES) for line in data.splitlines()]
    if key == "run.json":
        return without(json.loads(data), TIMES)
    if key.endswith("state.json"):
        return without(json.loads(data).get("progress", {}), ("run_id",))
    if "/" in key and key.endswith(".safetensors"):  # the order of tensors may differ
        return {name: tensor for name, tensor in deserialize(data) if not name.startswith("window/")}
    return data


def without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    """Return the values but for those of ``names``."""
    return {name: value for name, value in values.items() if name not in names}
