"""SIGTERM and SIGINT: the run saves a checkpoint and stops; resumed, it equals an uninterrupted run."""

import os
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml
from helpers.dying import at_call
from helpers.training import read_lines, untimed_lines

import ddk_train.loop.evaluate
import ddk_train.train
from ddk_cache.cli import main as cli
from ddk_train.errors import Stopped
from ddk_train.train import train


class Kill(NamedTuple):
    """The call of a module's function during which a signal comes, and the checkpoint that is then saved."""

    module: Any
    name: str
    call: int
    signal: signal.Signals
    step: int


@pytest.mark.parametrize(
    "kill",
    [
        Kill(ddk_train.train, "learning_rate", 2, signal.SIGTERM, 2),
        Kill(ddk_train.train, "learning_rate", 5, signal.SIGINT, 5),  # a step that saves a checkpoint anyway
        Kill(
            ddk_train.loop.evaluate, "make_batch", 14, signal.SIGTERM, 8
        ),  # measuring after the second interval
    ],
    ids=lambda kill: f"{kill.name}-{kill.call}",
)
def test_a_stopped_run_resumes(
    make_config: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    kill: Kill,
) -> None:
    train(make_config(output_dir=str(tmp_path / "whole")))
    caplog.set_level("INFO", "ddk_train")
    config, run = make_config(), tmp_path / "run"
    handler = signal.getsignal(kill.signal)
    function = at_call(kill.call, getattr(kill.module, kill.name), lambda: os.kill(os.getpid(), kill.signal))
    with monkeypatch.context() as patched:
        patched.setattr(kill.module, kill.name, function)
        with pytest.raises(Stopped) as stopped:
            train(config)
    checkpoint = run / f"checkpoint-{kill.step}"
    message = f"stopped by {kill.signal.name}: {checkpoint} is saved, --resume continues from it"
    assert str(stopped.value) == message
    assert message in caplog.messages
    assert stopped.value.exit_code == 128 + kill.signal
    assert signal.getsignal(kill.signal) == handler
    assert (checkpoint / "state.json").exists()
    train(config, resume=True)
    for file in ("metrics", "discrepancy"):
        assert untimed_lines(run, file) == untimed_lines(tmp_path / "whole", file)
    assert (run / "model.safetensors").read_bytes() == (tmp_path / "whole/model.safetensors").read_bytes()


def test_a_run_stopped_before_its_first_step(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through the command: its exit code is the shell's for the signal."""
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(make_config().model_dump(mode="json")))
    monkeypatch.setattr(sys, "argv", ["ddk-cache", "train", str(path)])
    slow = at_call(1, ddk_train.loop.evaluate.make_batch, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with monkeypatch.context() as patched:
        patched.setattr(ddk_train.loop.evaluate, "make_batch", slow)
        with pytest.raises(SystemExit) as ended:
            cli.main()
    assert ended.value.code == 143
    train(make_config(max_steps=2), resume=True)
    assert [line["step"] for line in read_lines(tmp_path / "run", "metrics")] == [2]
