"""Trackers get the values of the files; several at once, none of them with a network."""

import json
import os
import shutil
import sqlite3
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.training import read_lines
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import ddk_train.output.tracking
from ddk_cache.errors import ConfigError
from ddk_train.config import TrainConfig
from ddk_train.output.tracking import Records, progress_line
from ddk_train.train import train

SECRETS = (
    *("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AZURE_STORAGE_ACCOUNT_KEY", "HF_TOKEN"),
    *("WANDB_API_KEY", "DATABASE_PASSWORD"),
)
Scalars = dict[str, dict[int, float]]  # by name, then by step


def expected_scalars(run: Path) -> Scalars:
    """Return every number in the run's files by its name in trackers."""
    scalars: Scalars = {}
    for line in read_lines(run, "metrics"):
        for name, value in line.items():
            if name != "step":
                scalars.setdefault(f"train/{name}", {})[line["step"]] = value
    for line in read_lines(run, "discrepancy"):
        for name, by_domain in line.items():
            for domain, value in by_domain.items() if isinstance(by_domain, dict) else ():
                scalars.setdefault(f"{name}/{domain}", {})[line["step"]] = value
    return scalars


def tensorboard_scalars(run: Path) -> Scalars:
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def trackio_scalars(database: Path) -> Scalars:
    scalars: Scalars = {}
    with sqlite3.connect(database) as connection:
        for step, metrics in connection.execute("select step, metrics from metrics"):
            for name, value in json.loads(metrics).items():
                scalars.setdefault(name, {})[step] = value
    return scalars


def assert_same_scalars(logged: Scalars, expected: Scalars) -> None:
    assert set(logged) >= set(expected)
    for name, values in expected.items():
        assert logged[name] == pytest.approx(values, rel=1e-5)


def test_an_unknown_number_is_null(make_config: Any) -> None:
    config = make_config(report_to=[])
    Path(config.output_dir).mkdir()
    with Records(config, "id", 0, {}, print) as records:
        records.discrepancy(0, 0, ("code", "law"), standard_error=[0.5, float("nan")])
    [line] = read_lines(Path(config.output_dir), "discrepancy")
    assert line["standard_error"] == {"code": 0.5, "law": None}


def test_all_trackers_at_once(make_config: Any, tmp_path: Path) -> None:
    """Run the command in a separate process, since these libraries warn and leave threads.

    It runs inside a repository with secrets in its environment; they must not be in any file of the run.
    """
    config: TrainConfig = make_config(report_to=["tensorboard", "wandb", "trackio"])
    path = tmp_path / "train.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    command = [str(Path(sys.executable).with_name("ddk-cache")), "train", str(path)]
    environment = {
        **os.environ,
        "WANDB_MODE": "offline",
        "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TRACKIO_PROJECT": "students",
        "OMP_NUM_THREADS": "1",
    } | {name: f"{index:02}SECRET{'0' * 32}" for index, name in enumerate(SECRETS)}
    repository = tmp_path / "repository"
    subprocess.run(["git", "init", "-q", repository], check=True)
    remote = ["remote", "add", "origin", "https://me:SECRET@example.org/code.git"]
    subprocess.run(["git", "-C", repository, *remote], check=True)
    done = subprocess.run(
        command,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=repository,
    )
    assert done.returncode == 0, done.stderr
    assert "SECRET" not in done.stderr
    shutil.rmtree(repository)
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(files) > 20
    assert [path for path, data in files.items() if b"SECRET" in data] == []
    assert "Loading weights" not in done.stderr  # no library's bars
    assert "step 10/10" in done.stderr

    run = Path(config.output_dir)
    expected = expected_scalars(run)
    assert {"train/loss", "train/grad_norm", "factor/code", "student_ppl/law", "rows/prose"} <= set(expected)
    assert_same_scalars(tensorboard_scalars(run), expected)
    assert_same_scalars(trackio_scalars(tmp_path / "trackio" / "students.db"), expected)
    (offline,) = run.glob("wandb/offline-run-*/run-*.wandb")
    written = offline.read_bytes()
    assert all(name.encode() in written for name in expected)
    assert all(json.dumps(line["loss"]).encode() in written for line in read_lines(run, "metrics"))


def test_a_resumed_run_has_each_step_once(make_config: Any) -> None:
    config = make_config(report_to="tensorboard")
    train(config)
    run = Path(config.output_dir)
    shutil.rmtree(run / "checkpoint-10")
    train(config, resume=True)
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [3, 6, 9, 10]
    assert [event.step for event in events.Scalars("factor/code")] == [0, 4, 8, 10]
    assert_same_scalars(tensorboard_scalars(run), expected_scalars(run))


def test_a_missing_tracker_is_an_error_before_anything_is_loaded(
    make_config: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(
        ddk_train.output.tracking, "find_spec", lambda name: None if name == "wandb" else find_spec(name)
    )
    config = make_config(report_to=["tensorboard", "wandb"], student=str(tmp_path / "missing"))
    with pytest.raises(ConfigError, match="report_to: the package wandb is not installed: pip install wandb"):
        train(config)
    assert not Path(config.output_dir).exists()


def test_the_progress_line() -> None:
    line = {"step": 120, "loss": 2.3451, "tokens_per_second": 12345.6}
    assert progress_line(line, 3000, 5025.4, "factor", {"code": 0.306, "prose": 0.694}) == (
        "step 120/3000  loss 2.345  12,346 tokens/s  1:23:45 left  factor code 0.31 prose 0.69"
    )
