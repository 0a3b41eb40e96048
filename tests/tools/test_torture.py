"""The short form of tools/torture, and that it fails where the cache's code is broken."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from ddk_cache.errors import ConfigError
from ddk_cache.storage import lock
from ddk_cache.storage.lock import LockedStorage
from ddk_cache.storage.object_store import ObjectStore
from ddk_cache.util import durable
from tools.torture import documents, faults, interleavings, power, two_builders
from tools.torture.__main__ import KINDS, OF_ALL, OF_BUILDS, OF_TRAINING
from tools.torture.subject import Build, quiet, stored
from tools.torture.subjects import make_subject

SEED = int(os.environ.get("TORTURE_SEED", "25"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Any]]:
    """Return a function that makes the subject of a name, once."""
    folder = tmp_path_factory.mktemp("torture")
    with quiet():
        yield lambda name: make_subject(name, folder)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(("build", kind) for kind in OF_ALL | OF_BUILDS),
        *(("train", kind) for kind in OF_ALL | OF_TRAINING),
        *(("report", "files"), ("report", "kills"), ("export", "files"), ("export", "power")),
        *((name, "kills") for name in ("build-more-tokens", "build-more-domains", "train-lora")),
    ],
)
def test_nothing_is_lost(subject: Callable[[str], Any], name: str, kind: str) -> None:
    counts, failures = KINDS[kind](subject(name), SEED, 4.0)
    assert failures == []
    assert counts["trials"] > 0


@pytest.mark.parametrize(
    "name", ["build-tokens-first", "build-teachers", "build-chat", "train-ddp", "train-fsdp-or-one"]
)
def test_a_kill_of_a_variant_loses_nothing(subject: Callable[[str], Any], name: str) -> None:
    counts, failures = KINDS["kills"](subject(name), SEED, 0.0)
    assert failures == []
    assert counts["trials"] == 1


def test_ranks_that_train_otherwise_fail(subject: Callable[[str], Any]) -> None:
    ranks = subject("train-fsdp-or-one")
    ranks.begin()
    ranks.train(str(ranks.output), learning_rate=3.1e-3)
    assert "metrics.jsonl: differs" in ranks.problems(str(ranks.output), stored(ranks.output))


def test_a_shard_that_is_not_flushed_before_its_record_fails(
    subject: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = durable.sync

    def forgetful(path: Path) -> None:
        if "/gaps/c/" not in str(path):
            sync(path)

    monkeypatch.setattr(durable, "sync", forgetful)
    build = subject("build")
    build.begin()
    disk = power.Disk(build.output)
    with disk.watched():
        build.run(str(disk.root))
    left = next(left for model, _, left in reversed(disk.cuts) if model == power.JOURNAL)
    assert any("gaps" in problem for problem in power.run_on(build, left))


def test_a_lock_that_is_not_checked_fails(
    subject: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LockedStorage, "_guard", lambda self: nullcontext())
    _, failures = two_builders.torture(subject("build"), SEED, 15.0)
    assert failures


def test_all_interleavings_without_faults() -> None:
    counts, failures = interleavings.torture(None, SEED, math.inf, faults=0, beats=0)
    assert failures == []
    assert counts["states not visited"] == 0
    assert counts["trials"] > 1000


@pytest.mark.parametrize(
    "broken", ["no check before a write", "a live lock is stale", "puts without a condition"]
)
def test_a_broken_lock_is_found(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def swap(self: ObjectStore, key: str, before: object, data: bytes) -> bool:
        interleavings._put(None, key, data)
        return True

    if broken == "no check before a write":
        monkeypatch.setattr(LockedStorage, "_guard", lambda self: nullcontext())
    elif broken == "a live lock is stale":
        monkeypatch.setattr(lock, "STALE", 0.0)
    else:
        monkeypatch.setattr(ObjectStore, "swap", swap)
    interleavings.run.cache_clear()
    _, failures = interleavings.torture(None, SEED, math.inf, faults=0, beats=0, most_failures=1)
    interleavings.run.cache_clear()
    assert failures


def test_an_error_without_a_message_fails(
    subject: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(self: Build, output: str) -> None:
        raise TypeError("unsupported operand")

    with monkeypatch.context() as patched:
        patched.setattr(Build, "run", run)
        with pytest.raises(AssertionError, match="a traceback: TypeError"):
            faults._outcome(subject("build"), "cache")


def test_a_configuration_refused_in_several_lines_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, *_: object) -> None:
        raise ConfigError(f"{path}: is wrong\nin two ways")

    monkeypatch.setattr(documents, "load", load)
    with pytest.raises(AssertionError, match="a message of several lines"):
        documents.check_configuration(tmp_path, "train.yaml", b"")
