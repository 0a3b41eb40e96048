"""Training, report and export under torture."""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

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

Kind = TypeVar("Kind")
TIMES = ("tokens_per_second", "data_wait_fraction", "began", "ended")


class Training(Subject):
    """``ddk-cache train``, with ``--resume`` once there is a run: full weights, checkpoints and the best."""

    def __init__(self, folder: Path, build: Build, **changes: Any) -> None:
        self.build, self._changes = build, changes
        self.sources = (build.reference, build.teacher)
        super().__init__(folder)

    def run(self, output: str) -> None:
        """Train, or resume."""
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
        train(TrainConfig.model_validate(keys | self._changes), resume=is_run(Path(output)))

    def comparable(self, objects: Objects) -> Mapping[str, Any]:
        """Leave out times and, in checkpoints, the run's id."""
        return {key: _untimed(key, data) for key, data in objects.items() if not key.endswith(SUMS)}

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


BUILDS: dict[str, tuple[Any, Any]] = {
    "build": ({}, None),
    "build-label": ({"target": {"kind": "label"}}, None),
    "build-sampled": ({"target": {"kind": "sampled", "samples": 4}}, None),
    "build-all-targets": ({"validation_targets": True}, None),
    "build-more-tokens": ({}, {"domains": {"prose": {"max_tokens": 300}}}),
    "build-more-domains": ({"domains": {"prose": {}, "law": {}}}, {}),
}
TRAININGS: dict[str, dict[str, Any]] = {
    "train": {},
    "train-bf16": {"bf16": True},
    "train-lora": {"lora": {"r": 2, "alpha": 4}},
    "train-behind": {"save_behind": True},
}
OTHERS = ("report", "export")


@lru_cache
def make_subject(name: str, folder: Path) -> Subject:
    """Return a subject, with the caches and runs that it reads, in a folder of its own."""
    inside = folder / name
    if name in BUILDS:
        return Build(inside, *BUILDS[name])
    if name == "report":
        return Report(inside, _of(Training, "train", folder))
    build = _of(Build, "build", folder)
    return Exporting(inside, build) if name == "export" else Training(inside, build, **TRAININGS[name])


def _of(kind: type[Kind], name: str, folder: Path) -> Kind:
    subject = make_subject(name, folder)
    assert isinstance(subject, kind)
    return subject


def _untimed(key: str, data: bytes) -> Any:
    if key.endswith(".jsonl"):
        return [_without(json.loads(line), TIMES) for line in data.splitlines()]
    if key == "run.json":
        return _without(json.loads(data), TIMES)
    if key.endswith("state.json"):
        return _without(json.loads(data).get("progress", {}), ("run_id",))
    if "/" in key and key.endswith(".safetensors"):  # the order of tensors may differ
        return {name: tensor for name, tensor in deserialize(data) if not name.startswith("window/")}
    return data


def _without(values: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in names}
