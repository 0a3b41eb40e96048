"""The short form of tools/torture, and that it fails where the cache's code is broken."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest

from ddk_cache.storage.lock import LockedStorage
from ddk_cache.util import durable
from tools.torture import faults, power, two_builders
from tools.torture.__main__ import KINDS
from tools.torture.subject import Subject, quiet

SEED = int(os.environ.get("TORTURE_SEED", "25"))


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Subject]:
    with quiet():
        yield Subject(tmp_path_factory.mktemp("torture"))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_lost(subject: Subject, kind: str) -> None:
    counts, failures = KINDS[kind](subject, SEED, 4.0)
    assert failures == []
    assert counts["trials"] > 0


def test_a_shard_that_is_not_flushed_before_its_record_fails(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = durable.sync

    def forgetful(path: Path) -> None:
        if "/gaps/c/" not in str(path):
            sync(path)

    monkeypatch.setattr(durable, "sync", forgetful)
    disk = power.Disk(subject.folder / "forgetful")
    with disk.watched():
        subject.build(str(disk.root))
    model, _, left = disk.cuts[-1]
    assert model == power.JOURNAL
    assert any("gaps" in problem for problem in power.build_on(subject, disk.root, left))


def test_a_lock_that_is_not_checked_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LockedStorage, "_guard", lambda self: nullcontext())
    _, failures = two_builders.torture(subject, SEED, 15.0)
    assert failures


def test_an_error_without_a_message_fails(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    def build(cache: str) -> None:
        raise TypeError("unsupported operand")

    with monkeypatch.context() as patched:
        patched.setattr(subject, "build", build)
        with pytest.raises(AssertionError, match="a traceback: TypeError"):
            faults._fail(subject, str(Path("cache")), None)
