"""The folders that a run may write to; a dry run writes nothing."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from ddk_cache.errors import CacheError, ConfigError
from ddk_cache.storage import lock
from ddk_cache.storage.lock import locked
from ddk_train.cli import train as command
from ddk_train.output.folder import check_folder
from ddk_train.train import dry_run, train


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("taken", "message"),
    [
        ("student", "is the student, which would be overwritten"),
        ("cache", "is the cache, which would be overwritten"),
        ("link to the student", "is the student, which would be overwritten"),
        ("other files", "has files that are not a run's: name a new or an empty folder"),
        ("a file", "cannot write to"),
    ],
)
def test_a_folder_with_other_files_is_refused_and_unchanged(
    make_config: Any, tmp_path: Path, taken: str, message: str
) -> None:
    cache_folder, student_folder = Path(make_config().cache), make_config().student
    student, other = shutil.copytree(student_folder, tmp_path / "student"), tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text("model: mine")
    (other / "model.safetensors").write_bytes(b"years of work")
    (tmp_path / "link").symlink_to(student)
    folder = {
        "student": student,
        "cache": cache_folder,
        "link to the student": tmp_path / "link",
        "other files": other,
        "a file": other / "config.yaml",
    }[taken]
    before = contents(tmp_path)
    config = make_config(student=str(student), cache=f"file://{cache_folder}", output_dir=str(folder))
    for resume in (False, True):
        with pytest.raises(ConfigError, match=f"^output_dir: .*{message}"):
            train(config, resume=resume)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("inside", ["run", "code/run", "code/train/run", "linked"])
def test_a_folder_inside_a_cache_is_refused(
    make_config: Any, tmp_path: Path, cache_folder: Path, inside: str
) -> None:
    """Any cache, also through a link."""
    (tmp_path / "linked").symlink_to(cache_folder)
    folder = tmp_path / "linked" / "run" if inside == "linked" else cache_folder / inside
    before = contents(cache_folder)
    with pytest.raises(ConfigError, match=r"^output_dir: .* is inside the cache .*: name a folder elsewhe"):
        train(make_config(output_dir=str(folder)))
    assert contents(cache_folder) == before
    assert not folder.exists()


@pytest.mark.parametrize("cut", [None, 40])
def test_the_lock_of_a_run_before_a_power_cut_becomes_stale(
    make_config: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: int | None
) -> None:
    """The machine has started again since, or the run was on another one; the lock may be cut off."""
    run = train(make_config(max_steps=2))
    monkeypatch.setattr(lock, "STALE", 0.2)
    monkeypatch.setattr(lock, "POLL", 0.02)
    left = {"token": "x", "heartbeat": 1, "grants": [], "process": 1, "boot": "before"}
    (run / "ddk.lock").write_text(json.dumps(left)[:cut])
    (run / "run.json#0123456789ab").touch()
    train(make_config(max_steps=2), resume=True)
    assert not {"ddk.lock", "run.json#0123456789ab"} & {path.name for path in run.iterdir()}


def test_a_new_or_an_empty_folder_is_accepted_without_resume(make_config: Any, tmp_path: Path) -> None:
    """Also one in which a run was killed before it wrote anything but its lock."""
    config = make_config()
    check_folder(config, resume=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ddk.lock").touch()
    (tmp_path / "run" / "config.yaml#0123456789ab").touch()
    check_folder(config, resume=False)
    with pytest.raises(
        ConfigError, match=r"^--resume: output_dir .* has no run; leave --resume out to start"
    ):
        check_folder(config, resume=True)


def test_a_run_that_cannot_start_leaves_no_folder(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^student: "):
        train(make_config(student=str(tmp_path / "missing")))
    assert not (tmp_path / "run").exists()


def test_of_two_runs_in_a_folder_one_is_refused(make_config: Any, tmp_path: Path) -> None:
    config = make_config(max_steps=2, save_steps=1)
    train(config)
    before = contents(tmp_path / "run")
    with locked(config.output_dir), pytest.raises(CacheError, match=r"another .* is writing here"):
        train(config, resume=True)
    assert contents(tmp_path / "run") == before


def test_a_dry_run_needs_a_folder_that_can_be_written_to(make_config: Any) -> None:
    with pytest.raises(ConfigError, match=r"^output_dir: cannot write to /proc/run: "):
        dry_run(make_config(output_dir="/proc/run"))


def test_a_dry_run_prints_the_plan(make_config: Any, tmp_path: Path) -> None:
    path = tmp_path / "train.yaml"
    config = make_config(strategy="static", weights={"code": 1, "prose": 1, "law": 2}, share_of="rows")
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    done = CliRunner().invoke(command, [str(path), "--set", "seed=7", "--dry-run"], catch_exceptions=False)
    assert done.exit_code == 0
    assert not (tmp_path / "run").exists()
    assert yaml.safe_load(done.stdout) == config.model_copy(update={"seed": 7}).model_dump(mode="json")
    plan = [line.split() for line in done.stdout.splitlines() if line.startswith("# ")]
    assert " ".join(plan[0]) == "# 10 steps of 4 rows of 24 tokens: 40 rows, at most 960 tokens"
    by_domain = {line[1]: line[2:] for line in plan[1:]}
    assert by_domain["domain"] == ["rows", "labels", "tokens", "share", "epochs"]
    rows_share_epochs = {name: [line[0], *line[3:]] for name, line in by_domain.items() if name != "domain"}
    assert rows_share_epochs == {
        "code": ["20", "0.25", "0.50"],
        "prose": ["12", "0.25", "0.83"],
        "law": ["8", "0.50", "2.50"],
    }


@pytest.mark.parametrize("key", ["warmup_steps", "distill_interval"])
def test_steps_that_a_run_never_reaches_have_a_warning(
    make_config: Any, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    caplog.set_level("INFO", "ddk_train")
    dry_run(make_config(max_steps=10))
    assert "max_steps" not in caplog.text
    dry_run(make_config(max_steps=10, **{key: 10}))
    assert f"{key}: 10 is not below max_steps (10): " in caplog.text
    caplog.clear()
    dry_run(make_config(max_steps=10, strategy="uniform", distill_interval=10))
    assert "max_steps" not in caplog.text


def test_many_epochs_have_a_warning_and_too_many_an_error(
    make_config: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "ddk_train")
    # 4 rows a step of each domain
    keys = {"strategy": "uniform", "share_of": "rows", "per_device_train_batch_size": 12}
    dry_run(make_config(**keys, max_steps=40))
    assert "times" not in caplog.text
    dry_run(make_config(**keys, max_steps=60))
    assert [line for line in caplog.messages if "times" in line] == [
        "max_steps: 60 steps read domain 'law' about 30 times: "
        "after 20 it learns them by heart; set max_epochs"
    ]
    many = "^max_steps: 220 steps read domain 'law' about 110 times, which has 8 rows: set it to 40, or "
    with pytest.raises(ConfigError, match=many):
        dry_run(make_config(**keys, max_steps=220))
    dry_run(make_config(**keys, max_steps=220, domains={"law": {"max_epochs": 110}}))


def test_a_dry_run_checks_the_student(make_config: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^student: "):
        dry_run(make_config(student=str(tmp_path / "missing")))
