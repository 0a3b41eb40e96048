"""Rounds without engines: what each command is given, in which order, and what is left after a kill."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers.caches import VOCABULARY_MAP, make_manifest, write_domain

from ddk_cache import CacheError, ConfigError
from ddk_cache.cache.writer import open_writer
from ddk_cache.cli import rounds
from ddk_cache.cli.rounds import FOLLOWS, RoundsConfig, check, parts, run, run_command
from ddk_cache.util.interrupt import Stopped


def configuration(folder: Path, **changes: Any) -> RoundsConfig:
    keys = {
        "student": "student",
        "output": str(folder),
        "rounds": 3,
        "generate": {"seed": 5, "domains": {"maths": {"path": "prompts.jsonl", "prompt_column": "question"}}},
        "build": {"teacher": {"model": "teacher"}, "seq_length": 64, "target": {"kind": "label"}},
        "train": {"gamma": 0.9, "domains": {"code": {"gamma": 0.5}}},
    }
    return RoundsConfig.model_validate(keys | changes)


def test_each_round_writes_scores_and_trains_the_student_of_the_round_before(tmp_path: Path) -> None:
    made = list(parts(configuration(tmp_path, caches=["runs/general"])))
    assert [part.command for part in made] == ["generate", "build", "train"] * 3
    writes, scores, trains = (part.keys for part in made[3:6])
    first, second = tmp_path / "round-1", tmp_path / "round-2"
    assert (writes["model"], writes["output"], writes["seed"]) == (f"{first}/student", f"{second}/text", 6)
    assert scores["domains"] == {"maths-2": {"path": f"{second}/text/maths"}}
    assert (trains["student"], trains["output_dir"]) == (f"{first}/student", f"{second}/student")
    assert trains["cache"] == ["runs/general", f"{first}/cache", f"{second}/cache"]


def test_older_text_is_replayed_by_a_weight(tmp_path: Path) -> None:
    *_, last = parts(configuration(tmp_path))
    weights = {name: keys.get("policy_gradient_weight") for name, keys in last.keys["domains"].items()}
    assert weights == {"code": None, "maths-1": 0.25, "maths-2": 0.5, "maths-3": 1.0}
    *_, last = parts(configuration(tmp_path, replay=0, caches=["runs/general"]))
    assert last.keys["cache"] == ["runs/general", f"{tmp_path}/round-3/cache"]
    assert last.keys["domains"].keys() == {"code", "maths-3"}


def test_a_weight_of_written_text_leaves_the_others_as_they_are(tmp_path: Path) -> None:
    config = configuration(tmp_path, written={"policy_gradient_weight": 0.5, "max_epochs": 4})
    check(config)
    *_, last = parts(config)
    assert last.keys["domains"]["maths-2"] == {
        "gamma": 0,
        "cross_entropy_weight": 0,
        "policy_gradient_weight": 0.25,
        "max_epochs": 4,  # older text has less weight, and as many passes
    }
    assert config == RoundsConfig.model_validate(config.model_dump(mode="json"))


def test_adapters_are_merged_for_a_next_round(tmp_path: Path) -> None:
    check(configuration(tmp_path, train={"lora": {"merge": True}}))
    check(configuration(tmp_path, train={"lora": {}}, rounds=1))


def test_the_text_of_a_domain_has_keys_of_its_own(tmp_path: Path) -> None:
    config = configuration(tmp_path, domains={"maths": {"teacher_prefix_column": "hint"}})
    check(config)
    scored = [part.keys["domains"] for part in parts(config) if part.command == "build"]
    assert [*scored[1].values()] == [
        {"path": f"{tmp_path}/round-2/text/maths", "teacher_prefix_column": "hint"}
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train": {"gama": 0.2}}, "train: gama: unknown key; did you mean 'gamma'"),
        ({"build": {"teacher": {"model": "t"}, "seq_length": 1}}, "build: seq_length: "),
        ({"generate": {"domains": {}}}, "generate: domains: "),
        ({"domains": {"code": {}}}, r"domains\.code: is not a domain of generate"),
        (
            {"domains": {"maths": {"teacher_prefix": "hint"}}},
            "build: .*unknown key; did you mean 'teacher_pre",
        ),
        ({"train": {"domains": {"maths-3": {"gamma": 0.5}}}}, r"train: domains\.maths-3: is text of a round"),
        ({"train": {"lora": {"r": 4}}}, r"train: lora\.merge: must be true"),
        ({"written": {"gamma": 0.2}}, r"written\.gamma: must be 0: KL needs target\.kind topk or sampled"),
        ({"written": {"gama": 0.2}}, r"train: domains\.maths-1\.gama: unknown key; did you mean"),
    ],
)
def test_wrong_keys_of_a_part_are_refused_before_anything_runs(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        check(configuration(tmp_path, **changes))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (f"{part}.{key}=x", f"{part}: {key}: follows from the round; leave it out")
            for part, keys in FOLLOWS.items()
            for key in sorted(keys)
        ),
        ("generate.seed=abc", "generate: seed: must be an integer"),
        ("generate.domains=null", "generate: domains: must hold keys and values"),
        ("train.domains=null", "train: domains: must hold keys and values"),
        ("written.gamma={start: 0, end: 1, steps: 5}", "written.gamma: Input should be a valid number"),
        ("output=s3://bucket/rounds", "output: must be a folder of this machine, not a URL"),
    ],
)
def test_a_value_that_no_round_can_use_is_refused_by_its_key(
    tmp_path: Path, change: str, message: str
) -> None:
    path = tmp_path / "rounds.yaml"
    path.write_text(configuration(tmp_path).to_yaml())
    RoundsConfig.from_yaml(path)
    with pytest.raises(ConfigError) as refused:
        RoundsConfig.from_yaml(path, [change])
    assert str(refused.value) == f"{path}: {message}"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        ({"seq_length": 64}, "does not go with what build makes: rows of 16 and 64 tokens"),
        ({"target": {"kind": "sampled"}}, "does not go with what build makes: target.kind topk and sampled"),
    ],
)
def test_a_given_cache_that_does_not_go_with_the_rounds_is_refused_before_anything_runs(
    tmp_path: Path, cache_folder: Path, build: dict[str, Any], message: str
) -> None:
    keys = {"teacher": {"model": "teacher"}, "seq_length": 16, "target": {"kind": "label"}}
    check(configuration(tmp_path, build=keys, caches=[str(cache_folder)]))
    with pytest.raises(ConfigError, match=message):
        check(configuration(tmp_path, build=keys | build, caches=[str(cache_folder)]))


def test_a_given_cache_with_a_domain_of_a_round_is_refused_before_anything_runs(tmp_path: Path) -> None:
    url = str(tmp_path / "cache")
    with open_writer(url, make_manifest("maths-2"), VOCABULARY_MAP) as writer:
        write_domain(writer, "maths-2", 1)
    build = {"teacher": {"model": "teacher"}, "seq_length": 16, "target": {"kind": "label"}}
    check(configuration(tmp_path, build=build, caches=[url], rounds=1))
    with pytest.raises(ConfigError, match="with what build makes: both have a domain 'maths-2'; give that"):
        check(configuration(tmp_path, build=build, caches=[url]))
    with pytest.raises(ConfigError, match="both have a domain 'maths-2'; a domain has one cache"):
        check(configuration(tmp_path, build=build, caches=[url, url], rounds=1))


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Return the commands that would run; the sixth is killed."""
    seen: list[list[str]] = []

    def fake(arguments: list[str]) -> int:
        _, _, _, _, command, file, *options = arguments
        keys = yaml.safe_load(Path(file).read_text())
        seen.append([command, Path(file).parent.name, *options])
        if command == "train":
            folder = Path(keys["output_dir"])
            folder.mkdir(exist_ok=True)
            (folder / "config.yaml").write_text("")
            if len(seen) == 6:  # killed in its second round
                return 137
            (folder / "run.json").write_text(json.dumps({"ended": "2026-11-29T00:00:00Z"}))
        return 0

    monkeypatch.setattr(rounds, "run_command", fake)
    return seen


def test_a_killed_round_goes_on_where_it_was(tmp_path: Path, commands: list[list[str]]) -> None:
    config, lines = configuration(tmp_path, rounds=2), list[str]()
    with pytest.raises(CacheError, match="round-2, train ended with exit code 137"):
        run(config, lines.append)
    before = len(commands)
    assert run(config, lines.append) == tmp_path / "round-2" / "student"
    # What has ended finds that out by itself, but for training, which would refuse its folder.
    assert commands[before:] == [
        ["generate", "round-1"],
        ["build", "round-1"],
        ["generate", "round-2"],
        ["build", "round-2"],
        ["train", "round-2", "--resume"],
    ]
    assert "round-1, train: done" in lines


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (1, CacheError, "round-1, generate ended with exit code 1; the same command goes on from there"),
        (2, ConfigError, "round-1, generate: correct .* in your rounds.yaml, not in .*round-1/generate.yaml"),
    ],
)
def test_a_mistake_in_the_keys_of_a_part_is_one_of_the_rounds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, error: type[Exception], message: str
) -> None:
    monkeypatch.setattr(rounds, "run_command", lambda arguments: code)
    with pytest.raises(error, match=message):
        run(configuration(tmp_path), print)


STOPPED = """
import pathlib, time
from ddk_cache.util.interrupt import stopping
begun, ended = pathlib.Path("begun"), pathlib.Path("ended")
with stopping():
    try:
        begun.touch()
        time.sleep(600)
    finally:
        time.sleep(0.5)
        ended.touch()
"""


def test_a_signal_stops_the_command_too_and_waits_for_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a scheduler sends it to both, and the command gets it twice."""
    monkeypatch.chdir(tmp_path)
    started: list[int] = []
    popen = subprocess.Popen

    def start(arguments: list[str]) -> subprocess.Popen[bytes]:
        command = popen(arguments, stderr=subprocess.DEVNULL)
        started.append(command.pid)
        return command

    def scheduler() -> None:
        while not (tmp_path / "begun").exists():
            time.sleep(0.01)
        for pid in (*started, os.getpid()):
            os.kill(pid, signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", start)
    thread = threading.Thread(target=scheduler)
    thread.start()
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        run_command([sys.executable, "-c", STOPPED])
    thread.join()
    assert (tmp_path / "ended").exists()
