"""A small cache and short runs from it, on the CPU."""

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.training import MakeConfig, make_cache

from ddk_train.config import TrainConfig

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def cache_folder(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path) -> Path:
    """Make a finished cache of three domains."""
    return make_cache(tmp_path_factory.mktemp("caches") / "cache", teacher_folder)


@pytest.fixture
def make_config(tmp_path: Path, cache_folder: Path, student_folder: Path) -> MakeConfig:
    """Return a function from the keys that matter to a test to the configuration of a short float32 run."""

    def make(**changes: Any) -> TrainConfig:
        keys: dict[str, Any] = {
            "cache": str(cache_folder),
            "student": str(student_folder),
            "output_dir": str(tmp_path / "run"),
            "distill_interval": 4,
            "max_steps": 10,
            "per_device_train_batch_size": 4,
            "learning_rate": 3e-3,
            "min_learning_rate": 3e-4,
            "warmup_steps": 2,
            "bf16": False,
            "logging_steps": 3,
            "save_steps": 5,
            "report_to": "none",
        }
        return TrainConfig.model_validate(keys | changes)

    return make
