"""A full disk, a denied permission or a lost object store is one clear line, and the next build resumes."""

import shutil
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import yaml
from helpers import troubles
from helpers.builds import finish, objects, start, write_config, write_corpus
from helpers.stores import ObjectStore

from ddk_cache.cache.verify import verify
from ddk_cache.storage.storage import Storage
from tools.torture.subject import comparable


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_corpus(tmp_path_factory.mktemp("corpus"), documents=4)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, teacher_folder: Path, corpus: dict[str, Path]) -> Path:
    """Return the cache of an undisturbed build."""
    config = write_config(tmp_path_factory.mktemp("whole") / "build.yaml", teacher_folder, corpus)
    assert finish(config) == 0, config.with_suffix(".log").read_text()
    return config.parent / "cache"


def last_line(config: Path) -> str:
    """Return the error at the end of a command's log; lines of progress come before it."""
    text = config.with_suffix(".log").read_text()
    assert "Traceback" not in text
    assert text.count("Error: ") == 1
    line = text.splitlines()[-1]
    assert line.startswith("Error: ")
    return line


def train_config(folder: Path, cache: Path, student: Path) -> Path:
    """Return the configuration of a run with two steps and a checkpoint after each."""
    settings = {
        "cache": str(cache),
        "student": str(student),
        "output_dir": str(folder / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "bf16": False,
        "logging_steps": 1,
        "save_steps": 1,
        "report_to": "none",
    }
    path = folder / "train.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("what", ["ddk.vocabulary", "code/train/tokens", "tail/train/codes"])
def test_a_full_disk(
    tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path], whole: Path, what: str
) -> None:
    """Files may grow to one byte less than the largest of those objects needs."""
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus)
    sizes = {key: len(data) for key, data in objects(whole).items() if key.startswith(what)}
    limit = max(sizes.values()) - 1
    assert finish(config, prepare=partial(troubles.limit_files, limit)) == 1
    line = last_line(config)
    assert str(tmp_path / "cache") in line
    assert "File too large" in line
    assert finish(config) == 0
    assert comparable(objects(tmp_path / "cache")) == comparable(objects(whole))
    assert not list(verify(str(tmp_path / "cache")))


def test_a_disk_that_fills_up_while_training(tmp_path: Path, whole: Path, student_folder: Path) -> None:
    """The checkpoint does not fit; the metrics until then are kept."""
    config = train_config(tmp_path, whole, student_folder)
    assert finish(config, command="train", prepare=partial(troubles.limit_files, 50_000)) == 1
    assert "File too large" in last_line(config)
    assert not list((tmp_path / "run").glob("checkpoint-*"))
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert metrics.read_text().count("\n") == 1
    assert finish(config, "--resume", command="train") == 0
    assert metrics.read_text().count("\n") == 2


@pytest.fixture
def read_only(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "read-only"
    folder.mkdir(mode=0o555)
    yield folder
    folder.chmod(0o755)


def test_a_cache_in_a_read_only_folder(
    read_only: Path, tmp_path: Path, teacher_folder: Path, corpus: dict[str, Path]
) -> None:
    cache = read_only / "cache"
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus, cache=str(cache))
    assert finish(config, prepare=troubles.obey_permissions) == 1
    assert last_line(config).startswith(f"Error: {cache}: Permission denied")
    read_only.chmod(0o755)
    assert finish(config, prepare=troubles.obey_permissions) == 0


def test_a_run_in_a_read_only_folder(
    read_only: Path, tmp_path: Path, whole: Path, student_folder: Path
) -> None:
    config = train_config(tmp_path, whole, student_folder)
    change = ("--set", f"output_dir={read_only / 'run'}")
    assert finish(config, *change, command="train", prepare=troubles.obey_permissions) == 2
    expected = f"Error: {config}: output_dir: cannot write to {read_only / 'run'}: Permission denied"
    assert last_line(config) == expected


def test_a_report_in_a_read_only_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("cache: x\nstudent: x\noutput_dir: x\n")
    folder.chmod(0o555)
    assert finish(folder, command="report", prepare=troubles.obey_permissions) == 1
    assert last_line(folder) == f"Error: {folder / 'report.html'}: Permission denied"


def test_a_damaged_cache_that_is_read_only(tmp_path: Path, whole: Path) -> None:
    """The damaged shard is named; only its commit record stays."""
    cache = shutil.copytree(whole, tmp_path / "cache")
    (cache / "code/train/codes/c/0/0").write_bytes(b"other")
    for folder in (path for path in cache.rglob("*") if path.is_dir()):
        folder.chmod(0o555)
    assert finish(cache, command="verify", prepare=troubles.obey_permissions) == 1
    log = cache.with_suffix(".log").read_text()
    assert "code/train shard 0: codes has 5 bytes, fewer or more than it can have" in log
    assert "Error" not in log


@pytest.mark.parametrize("is_patient", [True, False], ids=["for a while", "for long"])
def test_an_object_store_that_goes_away(
    tmp_path: Path,
    teacher_folder: Path,
    corpus: dict[str, Path],
    whole: Path,
    object_store: ObjectStore,
    is_patient: bool,
) -> None:
    """For a while: requests are retried. For long: one line, and the next build resumes."""
    url = f"{object_store.url}/{'patient' if is_patient else 'impatient'}"
    config = write_config(tmp_path / "build.yaml", teacher_folder, corpus, cache=url)
    process = start(config, prepare=None if is_patient else troubles.shorten_retries)
    while process.is_alive() and len(Storage(url).sizes("")) < len(objects(whole)) // 2:
        time.sleep(0.01)
    object_store.go_away()
    assert process.is_alive()
    if is_patient:
        time.sleep(2)
    else:
        process.join(120)
    object_store.come_back()
    process.join(120)
    if not is_patient:
        assert process.exitcode == 1
        assert last_line(config).startswith(f"Error: {url}")
        assert finish(config) == 0
    assert process.exitcode == (0 if is_patient else 1), config.with_suffix(".log").read_text()
    storage = Storage(url)
    stored = {key: storage.read(key) or b"" for key in storage.sizes("")}
    assert comparable(stored) == comparable(objects(whole))
