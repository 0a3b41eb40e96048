"""SIGTERM and SIGINT: what was done is saved, said, and gone on from as if nothing had been."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from train.dying import at_call
from train.makers import read_lines, untimed_lines

import ddk_train.evaluate
import ddk_train.train
from ddk_cache import cli
from ddk_train.errors import Stopped
from ddk_train.train import train


@pytest.mark.parametrize(
    ("module", "name", "call", "step", "number"),
    [
        (ddk_train.train, "learning_rate", 2, 2, signal.SIGTERM),
        (ddk_train.train, "learning_rate", 5, 5, signal.SIGINT),  # a checkpoint comes here anyway
        (
            ddk_train.evaluate,
            "make_batch",
            14,
            8,
            signal.SIGTERM,
        ),  # in the measurement after the second interval
    ],
)
def test_a_stopped_run_goes_on(
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    module: Any,
    name: str,
    call: int,
    step: int,
    number: signal.Signals,
) -> None:
    train(make_config(output_dir=str(tmp_path / "whole")))
    caplog.set_level("INFO", "ddk_train")
    config, run = make_config(), tmp_path / "run"
    before = signal.getsignal(number)
    with monkeypatch.context() as patched:
        patched.setattr(
            module, name, at_call(call, getattr(module, name), lambda: os.kill(os.getpid(), number))
        )
        with pytest.raises(Stopped) as stopped:
            train(config)
    said = f"stopped by {number.name}: {run / f'checkpoint-{step}'} is saved, --resume continues from it"
    assert str(stopped.value) == said
    assert said in caplog.messages
    assert stopped.value.exit_code == 128 + number
    assert signal.getsignal(number) == before
    assert (run / f"checkpoint-{step}" / "state.json").exists()
    train(config, resume=True)
    for file in ("metrics", "discrepancy"):
        assert untimed_lines(run, file) == untimed_lines(tmp_path / "whole", file)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_run_stopped_before_its_first_step(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: its exit code is what a shell calls the signal."""
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["ddk-cache", "train", str(path)])
    slow = at_call(1, ddk_train.evaluate.make_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patched:
        patched.setattr(ddk_train.evaluate, "make_batch", slow)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 143
    train(make_config(max_steps=2), resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "run", "metrics")] == [2]
