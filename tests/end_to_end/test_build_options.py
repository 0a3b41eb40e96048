"""``build`` without an engine, without effect, and told to stop."""

import os
import random
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.builds import finish, objects, start, write_config, write_corpus
from helpers.commands import Run

import ddk_cache
from ddk_cache.storage.lock import LOCK_KEY
from tools.torture.subject import comparable


@pytest.fixture
def config(tmp_path: Path, teacher_folder: Path) -> Path:
    return write_config(tmp_path / "build.yaml", teacher_folder, write_corpus(tmp_path))


def test_tokens_alone_then_the_rest_is_the_same_build(config: Path, tmp_path: Path, run: Run) -> None:
    cache = tmp_path / "cache"
    said = run("build", config, "--tokens-only")
    assert said.code == 0
    assert said.out.count("not yet read by the teacher") == 2
    tokens = objects(cache)
    assert not [key for key in tokens if "label_logprob/c" in key or "codes/c" in key]
    with pytest.raises(ddk_cache.CacheError, match="is not finished"):
        ddk_cache.open_cache(str(cache))
    later = run("build", config)
    assert later.code == 0
    assert "tokenising" not in later.err
    assert all(objects(cache)[key] == data for key, data in tokens.items() if "/c/" in key)
    at_once = write_config(
        tmp_path / "other.yaml",
        Path(yaml.safe_load(config.read_text())["teacher"]["model"]),
        write_corpus(tmp_path),
        cache=str(tmp_path / "other"),
    )
    assert run("build", at_once).code == 0
    assert comparable(objects(tmp_path / "other")) == comparable(objects(cache))


def test_tokens_need_no_engine(config: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ddk_build.teacher.engines.find_spec", lambda name: None)
    assert run("build", config, "--set", "teacher.engine=vllm").mistake.startswith(
        f"{config}: teacher.engine: vllm is not"
    )
    assert run("build", config, "--set", "teacher.engine=vllm", "--tokens-only").code == 0


def test_a_dry_run_writes_nothing(config: Path, tmp_path: Path, run: Run) -> None:
    before = sorted(tmp_path.rglob("*"))
    said = run("build", config, "--dry-run", "--set", "seed=7")
    assert (said.code, sorted(tmp_path.rglob("*"))) == (0, before)
    merged = yaml.safe_load(said.out)
    assert merged["seed"] == 7
    assert merged["validation_targets"] is False
    assert "# code: new, all of its source\n# code: can be read; its first document has" in said.out


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("teacher.model=/nowhere/at/all", "teacher.model: /nowhere/at/all: there is no such folder"),
        ("domains.code.data_files=missing.jsonl", "domains.code: "),
        ("domains.code.split=train[:1]", "domains.code: needs two different documents"),
        ("domains.code.text_column=words", "domains.code: there is no column 'words'"),
        ("seq_length=4096", "seq_length: 4096 is more than the 512 positions"),
    ],
)
def test_a_dry_run_finds_what_the_build_would(config: Path, run: Run, change: str, said: str) -> None:
    found = run("build", config, "--dry-run", "--set", change)
    assert found.code == 2
    assert found.mistake.startswith(f"{config}: {said}")


def test_a_dry_run_says_what_a_domain_grows_to(config: Path, run: Run) -> None:
    small, large = (("--set", f"domains.code.max_tokens={count}") for count in (700, 900))
    assert run("build", config, "--tokens-only", *small).code == 0
    said = run("build", config, "--dry-run", *large)
    assert "# code: has 700 tokens of its source; grows to up to 900 tokens" in said.out


def test_a_dry_run_finds_a_folder_that_only_seems_to_be_writable(config: Path, run: Run) -> None:
    found = run("build", config, "--dry-run", "--set", "cache=/proc/cache")
    assert (found.code, found.mistake) == (1, "/proc/cache: /proc is not a folder that can be written to")


@pytest.mark.parametrize("inside", ["", "/cache"])
def test_a_dry_run_finds_a_file_where_the_cache_should_be(config: Path, run: Run, inside: str) -> None:
    found = run("build", config, "--dry-run", "--set", f"cache={config}{inside}")
    assert found.code == 1
    assert found.mistake == f"{config}{inside}: {config} is not a folder that can be written to"


def test_a_dry_run_knows_the_cache_that_is_there(config: Path, tmp_path: Path, run: Run) -> None:
    assert run("build", config, "--tokens-only").code == 0
    before = objects(tmp_path / "cache")
    again = run("build", config, "--dry-run")
    assert again.code == 0
    assert re.search(
        "# code: has [0-9,]+ tokens of its source; no text will be added, and answers", again.out
    )
    changes = ("seed=1", "target.top_k=4", "domains.code.split=train[:50%]")
    other = run("build", config, "--dry-run", *(word for change in changes for word in ("--set", change)))
    assert other.code == 2
    assert other.mistake.endswith(
        "was built with another configuration: target.top_k: 8 -> 4; seed: 0 -> 1; "
        "domains.code.split: None -> 'train[:50%]'"
    )
    assert objects(tmp_path / "cache") == before


def test_a_list_in_a_domain_is_the_same_in_the_next_build(config: Path, run: Run) -> None:
    command = ("build", config, "--tokens-only", "--set", "domains.code.allow_dropped=[tools]")
    assert [run(*command).code, run(*command).code] == [0, 0]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_build_told_to_stop_gives_its_lock_back(config: Path, tmp_path: Path, number: Any) -> None:
    cache = tmp_path / "cache"
    process = start(config)
    records = cache / "code" / "validation" / "commits" / "c"
    deadline = time.monotonic() + 120
    while not records.exists() and time.monotonic() < deadline:
        time.sleep(random.Random(0).random() * 0.01)
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join(60)
    assert process.exitcode == 128 + number
    assert f"stopped by {number.name}: what is finished is kept" in config.with_suffix(".log").read_text()
    assert not (cache / LOCK_KEY).exists()
    assert finish(config) == 0
    assert ddk_cache.open_cache(str(cache)).complete
