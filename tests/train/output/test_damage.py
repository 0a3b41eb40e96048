"""A damaged or hostile run folder: what is refused by name, what is resumed from, what is never touched."""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from helpers.training import read_lines, untimed_lines

from ddk_cache.cli.main import commands
from ddk_train.config import TrainConfig
from ddk_train.errors import TrainingError
from ddk_train.output import sums
from ddk_train.output.verify import verify
from ddk_train.train import train

TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture(scope="module")
def trained(
    tmp_path_factory: pytest.TempPathFactory, cache_folder: Path, student_folder: Path
) -> tuple[TrainConfig, Path]:
    """Train a run with checkpoints 5 and 10; return its configuration and a folder to copy it from."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    keys: dict[str, Any] = {
        "distill_interval": 4,
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "warmup_steps": 2,
        "bf16": False,
        "logging_steps": 3,
        "save_steps": 5,
        "report_to": "none",
    }
    config = TrainConfig(cache=str(cache_folder), student=str(student_folder), output_dir=str(folder), **keys)
    train(config)
    return config, folder


@pytest.fixture
def run(trained: tuple[TrainConfig, Path], tmp_path: Path) -> tuple[TrainConfig, Path]:
    """Return a copy of the run, and its configuration."""
    config, folder = trained
    copy = shutil.copytree(folder, tmp_path / "run")
    return config.model_copy(update={"output_dir": str(copy)}), copy


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def edit_state(checkpoint: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a checkpoint's state, and its digest with it."""
    path = checkpoint / "state.json"
    state = json.loads(path.read_bytes())
    change(state)
    path.write_text(json.dumps(state))
    resum(checkpoint, "state.json")


def resum(folder: Path, name: str) -> None:
    lines = (folder / sums.SUMS).read_text().splitlines()
    digests = {line[66:]: line[:64] for line in lines}
    sums.write_sums(folder, digests | {name: hashlib.sha256((folder / name).read_bytes()).hexdigest()})


def replace_by_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "flipped tensor bit": (lambda c: flip(c / TENSORS), f"{TENSORS}: is damaged"),
    "cut tensors": (lambda c: (c / TENSORS).write_bytes(b"x"), f"{TENSORS}: is damaged"),
    "empty tensors": (lambda c: (c / TENSORS).write_bytes(b""), f"{TENSORS}: is damaged"),
    "missing tensors": (lambda c: (c / TENSORS).unlink(), f"{TENSORS}: is missing"),
    "foreign tensors": (lambda c: shutil.copy(c / TENSORS, c / "a.safetensors"), "a.safetensors: is not in"),
    "empty state": (lambda c: (c / "state.json").write_bytes(b""), "state.json: is damaged"),
    "no digests": (lambda c: (c / sums.SUMS).unlink(), "SHA256SUMS: is missing"),
    "no list of digests": (lambda c: (c / sums.SUMS).write_text("../../x\n"), "SHA256SUMS: is not a list"),
    "a pipe": (lambda c: replace_by_pipe(c / TENSORS), f"{TENSORS}: .*not a regular file"),
    "no state": (lambda c: edit_state(c, lambda s: s.clear()), "state.json: progress: is required"),
    "huge step": (
        lambda c: edit_state(c, lambda s: s["progress"].update(step=10**9)),
        "is of step 1000000000",
    ),
    "negative": (lambda c: edit_state(c, lambda s: s["progress"].update(tokens=-1)), "progress.tokens: "),
    "nan": (
        lambda c: edit_state(c, lambda s: s["progress"]["factor"].insert(0, float("nan"))),
        "progress.factor.0: ",
    ),
    "drawn": (
        lambda c: edit_state(c, lambda s: s["progress"]["sampler"]["drawn"].append(10**12)),
        "its counts do not fit together",
    ),
    "a folder alone": (empty, "SHA256SUMS: is missing"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_an_older_one_resumed(
    run: tuple[TrainConfig, Path],
    trained: tuple[TrainConfig, Path],
    kind: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO", "ddk_train")
    config, folder = run
    damage, message = DAMAGE[kind]
    damage(folder / "checkpoint-10")
    train(config, resume=True)
    (line,) = [line for line in caplog.messages if line.startswith("damaged: ")]
    assert line.startswith("damaged: checkpoint-10: ")
    assert line.endswith(f"; resuming from {folder / 'checkpoint-5'}")
    assert re.search(message, line)
    assert (folder / "damaged-checkpoint-10").is_dir()
    for name in ("metrics", "discrepancy"):
        assert untimed_lines(folder, name) == untimed_lines(trained[1], name)
    assert (folder / "model.safetensors").read_bytes() == (trained[1] / "model.safetensors").read_bytes()


def test_without_a_whole_checkpoint_all_are_named(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    flip(folder / "checkpoint-10" / TENSORS)
    (folder / "checkpoint-5" / "state.json").unlink()
    with pytest.raises(TrainingError) as caught:
        train(config, resume=True)
    assert str(caught.value) == (
        f"--resume: {folder} has no whole checkpoint: checkpoint-10: {TENSORS}: is damaged: not what was "
        "written; checkpoint-5: state.json: is missing; train again elsewhere"
    )


def test_logs_shorter_than_the_checkpoint_keep_their_whole_lines(
    run: tuple[TrainConfig, Path], trained: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddk_train")
    config, folder = run
    shutil.rmtree(folder / "checkpoint-10")
    metrics = folder / "metrics.jsonl"
    metrics.write_bytes(metrics.read_bytes()[:20])  # within line 1; the checkpoint has line 1
    (folder / "discrepancy.jsonl").unlink()
    train(config, resume=True)
    assert [line["step"] for line in read_lines(folder, "metrics")] == [6, 9, 10]
    assert [line["step"] for line in read_lines(folder, "discrepancy")] == [8, 10]
    for name in ("metrics", "discrepancy"):
        assert (
            untimed_lines(folder, name) == untimed_lines(trained[1], name)[-len(read_lines(folder, name)) :]
        )
        assert f"{name}.jsonl: of the lines up to step 5, " in caplog.text
    assert "\0" not in metrics.read_text()


def test_changed_bytes_of_a_log_are_reported(
    run: tuple[TrainConfig, Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddk_train")
    config, folder = run
    flip(folder / "metrics.jsonl")
    train(config, resume=True)
    assert (
        "metrics.jsonl: of the lines up to step 10, some bytes are damaged; the others are kept"
        in caplog.text
    )


def test_a_claimed_length_makes_no_large_file(run: tuple[TrainConfig, Path]) -> None:
    config, folder = run
    edit_state(folder / "checkpoint-10", lambda state: state["files"]["metrics.jsonl"].update(bytes=10**12))
    size = (folder / "metrics.jsonl").stat().st_size
    train(config, resume=True)
    assert (folder / "metrics.jsonl").stat().st_size == size


@pytest.mark.parametrize(
    "name", ["metrics.jsonl", "discrepancy.jsonl", "samples.jsonl", "tensorboard"], ids=str
)
def test_logs_that_are_links_are_refused(run: tuple[TrainConfig, Path], tmp_path: Path, name: str) -> None:
    config, folder = run
    diary = tmp_path / "diary"
    diary.mkdir() if name == "tensorboard" else diary.write_text("dear diary\n")
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(diary)
    config = config.model_copy(update={"report_to": ["tensorboard"] if name == "tensorboard" else []})
    with pytest.raises(TrainingError, match=rf"{name}: "):
        train(config, resume=True)
    assert diary.is_dir() or diary.read_text() == "dear diary\n"
    assert not (diary.is_dir() and any(diary.iterdir()))


def test_files_that_are_links_are_replaced(run: tuple[TrainConfig, Path], tmp_path: Path) -> None:
    config, folder = run
    names = ["config.json", "model.safetensors", "tokenizer.json", "run.json", sums.SUMS]
    for name in names:
        (folder / name).rename(tmp_path / name)
        (folder / name).symlink_to(tmp_path / name)
    before = {name: (tmp_path / name).read_bytes() for name in names}
    partial = tmp_path / "elsewhere"
    partial.mkdir()
    for name in ("partial-checkpoint-10", "partial-student", "checkpoint-12"):
        (folder / name).symlink_to(partial)
    shutil.rmtree(folder / "checkpoint-10")
    train(config, resume=True)
    assert {name: (tmp_path / name).read_bytes() for name in names} == before
    assert not any(partial.iterdir())
    assert not any((folder / name).is_symlink() for name in names)


def test_a_finished_run_has_the_digests_of_its_files(run: tuple[TrainConfig, Path]) -> None:
    _, folder = run
    assert not list(sums.damage(folder))
    listed = {line[66:] for line in (folder / sums.SUMS).read_text().splitlines()}
    assert listed >= {"model.safetensors", "config.json", "tokenizer.json", "metrics.jsonl", "run.json"}
    flip(folder / "model.safetensors")
    assert list(sums.damage(folder)) == ["model.safetensors: is damaged: not what was written"]


def verified(folder: Path) -> list[str]:
    """Return the problems of a run, as ``ddk-cache verify`` prints them."""
    problems = verify(str(folder))
    assert problems is not None
    return list(problems)


def test_verify_names_each_damaged_file(run: tuple[TrainConfig, Path], cache_folder: Path) -> None:
    _, folder = run
    assert verified(folder) == []
    assert verify(str(cache_folder)) is None
    flip(folder / "checkpoint-5" / TENSORS)
    (folder / "checkpoint-10" / "state.json").unlink()
    flip(folder / "metrics.jsonl")
    (folder / "tokenizer.json").unlink()
    written = "is damaged: not what was written"
    assert verified(folder) == [
        f"checkpoint-5/{TENSORS}: {written}",
        "checkpoint-10/state.json: is missing",
        f"metrics.jsonl: {written}",
        "tokenizer.json: is missing",
    ]


def test_verify_checks_the_logs_of_an_unfinished_run(run: tuple[TrainConfig, Path]) -> None:
    _, folder = run
    (folder / sums.SUMS).unlink()
    assert verified(folder) == ["SHA256SUMS: is missing, although the run has ended"]
    facts = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(facts | {"ended": None}))
    assert verified(folder) == []
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 11')  # the run is at work, or was killed
    assert verified(folder) == []
    flip(folder / "metrics.jsonl")
    (folder / "samples.jsonl").unlink()
    assert verified(folder) == [
        "metrics.jsonl: is damaged: not what was written before the newest checkpoint",
        "samples.jsonl: No such file or directory",
    ]


@pytest.mark.skipif(not entry_points(group="ddk_cache.verify"), reason="needs pip install -e . again")
def test_the_command_verifies_a_run(run: tuple[TrainConfig, Path]) -> None:
    _, folder = run
    done = CliRunner().invoke(commands, ["verify", str(folder)])
    assert (done.exit_code, done.stdout) == (0, f"{folder}: every byte is as it was written\n")
    flip(folder / "model.safetensors")
    done = CliRunner().invoke(commands, ["verify", str(folder)])
    assert done.exit_code == 1
    assert done.stdout.splitlines() == [
        "model.safetensors: is damaged: not what was written",
        f"{folder}: 1 problem",
    ]


def test_a_run_with_damaged_measurements_and_facts_ends(run: tuple[TrainConfig, Path]) -> None:
    """Its card has what is left."""
    config, folder = run
    shutil.rmtree(folder / "checkpoint-10")
    first, *rest = (folder / "discrepancy.jsonl").read_bytes().splitlines(keepends=True)
    (folder / "discrepancy.jsonl").write_bytes(b"\xff" + first + b"".join(rest))
    (folder / "run.json").write_text("{")
    train(config, resume=True)
    assert "| nan |" in (folder / "README.md").read_text()
    assert "in 10 steps by ddk-cache " in (folder / "README.md").read_text()
