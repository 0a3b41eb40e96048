"""The public names of ``ddk_train``, and that using them changes nothing else in the process."""

import logging
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import ddk_train
from ddk_cache.errors import ConfigError
from ddk_train import TrainConfig

FIRST_IMPORTS = (
    "from ddk_train import train",
    "import ddk_train.train",
    "from ddk_train.train import train",
)
BOTH_WORK = """
import inspect
import ddk_train
function = ddk_train.train
from ddk_train.train import train, distill
assert ddk_train.train is function and callable(function)
assert inspect.signature(function) == inspect.signature(train)
assert ddk_train.train.distill is distill
from ddk_train import *
assert TrainConfig is ddk_train.TrainConfig
"""
UNCHANGED = """
import logging, signal, sys, warnings
before = list(warnings.filters), [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
import ddk_train
assert not {"torch", "transformers", "pydantic"} & set(sys.modules)
ddk_train.TrainConfig
assert not {"torch", "transformers"} & set(sys.modules)
assert before[1] == [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
assert not logging.getLogger("ddk_train").handlers and not logging.getLogger().handlers
"""


def run_python(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("first", FIRST_IMPORTS)
def test_train_is_a_function_and_a_module_whichever_is_imported_first(first: str) -> None:
    run_python(first + BOTH_WORK)


def test_importing_changes_nothing_in_the_process() -> None:
    run_python(UNCHANGED)


def test_a_run_returns_its_folder_and_restores_the_process(
    make_config: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    def state() -> list[Any]:
        logger = logging.getLogger("ddk_train")
        return [
            list(warnings.filters),
            [signal.getsignal(stop) for stop in (signal.SIGINT, signal.SIGTERM)],
            (logger.level, list(logger.handlers)),
            torch.get_float32_matmul_precision(),
            torch.get_rng_state().tolist(),
        ]

    config = make_config(max_steps=1)
    before = state()
    folder = ddk_train.train(config)
    assert state() == before
    assert folder == Path(config.output_dir)
    assert (folder / "model.safetensors").exists()
    assert "step 1/1" not in "".join(capfd.readouterr())  # logged, not printed
    assert ddk_train.train(config, resume=True) == folder


def test_a_configuration_is_read_as_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump({"cache": "c", "student": "s", "output_dir": "o"}))
    config = TrainConfig.from_yaml(path, ["lora.r=4", "max_steps=5"])
    assert config.lora is not None
    assert (config.max_steps, config.lora.r) == (5, 4)
    assert TrainConfig.from_yaml(str(path)) == TrainConfig(cache="c", student="s", output_dir="o")
    with pytest.raises(ConfigError, match=r"train\.yaml: max_step: unknown key; did you mean 'max_steps'"):
        TrainConfig.from_yaml(path, ["max_step=5"])
