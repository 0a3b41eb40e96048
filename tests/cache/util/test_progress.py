"""The progress of long work in a log, a notebook and a terminal."""

import logging
import os
import pty
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType, SimpleNamespace

import pytest

from ddk_cache.util.progress import Update, meter, shown_by


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the seconds since the start, which a test may change."""
    now = [0.0]
    monkeypatch.setattr("ddk_cache.util.progress.time.monotonic", lambda: now[0])
    return now


@pytest.fixture
def shown(clock: list[float], caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """Return a function that returns the lines logged so far."""
    caplog.set_level(logging.INFO, "ddk_cache.util.progress")
    return lambda: [record.getMessage() for record in caplog.records]


def test_a_log_has_the_whole_and_the_part(clock: list[float], shown: Callable[[], list[str]]) -> None:
    with meter("teacher", "tokens", parts={"code": 600, "law": 400}) as work:
        for part, amount in (("code", 500), ("code", 100), ("law", 200), ("law", 200)):
            clock[0] += 10
            work.advance(amount, part)
    assert shown() == [
        "teacher: 500 tokens, 50/s, 50% done, 0:00:10 left; now code, 83%",
        "teacher: 600 tokens, 30/s, 60% done, 0:00:13 left; now code, 100%",
        "teacher: 800 tokens, 27/s, 80% done, 0:00:07 left; now law, 50%",
        "teacher: 1,000 tokens, 25/s, 100% done, 0:00:00 left; now law, 100%",
        "teacher: 1,000 tokens in 0:00:40, 25/s",
    ]


def test_a_part_that_ends_early_shortens_the_whole(
    clock: list[float], shown: Callable[[], list[str]]
) -> None:
    with meter("tokenising", "tokens", parts={"small": 1_000, "done before": 500, "large": 300}) as work:
        work.advance(100, "small")
        work.end("small")
        work.end("done before")
        clock[0] = 10
        work.advance(100, "large")
    assert shown() == [
        "tokenising: 200 tokens, 20/s, 50% done, 0:00:10 left; now large, 33%",
        "tokenising: 200 tokens in 0:00:10, 20/s",
    ]


def test_without_a_total_no_time_left_is_shown(clock: list[float], shown: Callable[[], list[str]]) -> None:
    with meter("tokenising", "tokens", parts={"stream": None, "file": 300}) as work:
        clock[0] = 10
        work.advance(1_000, "stream")
    assert shown() == [
        "tokenising: 1,000 tokens, 100/s; now stream, 1,000",
        "tokenising: 1,000 tokens in 0:00:10, 100/s",
    ]


def test_work_of_less_than_a_second_has_no_rate(clock: list[float], shown: Callable[[], list[str]]) -> None:
    with meter("tokenising", "tokens") as work:
        clock[0] = 0.01
        work.advance(33_084)
    assert shown()[-1] == "tokenising: 33,084 tokens"


def test_a_caller_may_show_progress_itself(clock: list[float], capfd: pytest.CaptureFixture[str]) -> None:
    updates: list[Update] = []
    with shown_by(updates.append), meter("verify", "bytes", 10) as work:
        clock[0] = 2
        work.advance(4)
    assert updates == [
        Update("verify", "bytes", 4, 10, "", 4, 10, 2.0, "running"),
        Update("verify", "bytes", 4, 4, "", 4, 4, 2.0, "finished"),
    ]
    assert capfd.readouterr() == ("", "")


def test_a_failure_is_reported_and_adds_no_line(shown: Callable[[], list[str]]) -> None:
    updates: list[Update] = []
    for display in (nullcontext(), shown_by(updates.append)):
        with pytest.raises(OSError, match="full"), display, meter("verify", "bytes", 10):
            raise OSError("full")
    assert shown() == []
    assert [update.state for update in updates] == ["failed"]


def test_a_notebook_gets_one_line(clock: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def display(data: dict[str, str], **options: bool) -> SimpleNamespace:
        shown.append(data["text/plain"])
        return SimpleNamespace(update=display)

    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))
    module = ModuleType("IPython.display")
    monkeypatch.setattr(module, "display", display, raising=False)
    monkeypatch.setitem(sys.modules, "IPython", ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    with meter("verify", "bytes", 10) as work:
        clock[0] = 2
        work.advance(4)
    assert shown == ["", "verify: 4 bytes, 2/s, 40% done, 0:00:03 left", "verify: 4 bytes in 0:00:02, 2/s"]


def test_the_bars_on_a_terminal_end_with_amounts_and_seconds() -> None:
    """Of the whole and each part."""
    main, side = pty.openpty()
    script = """
from ddk_cache.cli.main import on_stderr
from ddk_cache.util.progress import meter, shown_by
with shown_by(on_stderr()), meter("teacher", "tokens", parts={"code": 1_000, "law": 4_000}) as work:
    work.advance(1_000, "code")
    work.advance(2_500, "law")
"""
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    subprocess.run([sys.executable, "-c", script], stderr=side, check=True, env=environment)
    os.close(side)
    frame = os.read(main, 1 << 16).decode().rpartition("\x1b[2K")[2]
    os.close(main)
    pattern = r"^ *(\w+) +━+ 100% +([\d,]+) tokens +[\d,]+/s +0:00:00\r$"
    assert re.findall(pattern, frame, re.MULTILINE) == [
        ("teacher", "3,500"),
        ("code", "1,000"),
        ("law", "2,500"),
    ]
