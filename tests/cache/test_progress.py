"""What a log and a terminal show of long work."""

import os
import pty
import re
import subprocess
import sys

import pytest

from ddk_cache.progress import meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that have gone by, to be changed."""
    now = [0.0]
    monkeypatch.setattr("ddk_cache.progress.time.monotonic", lambda: now[0])
    return now


def test_a_log_has_the_whole_with_its_time_left_and_the_part(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with meter("teacher", "tokens", parts={"code": 600, "law": 400}) as shown:
        for part, amount in (("code", 500), ("code", 100), ("law", 200), ("law", 200)):
            clock[0] += 10
            shown.advance(amount, part)
    assert capsys.readouterr().err.splitlines() == [
        "teacher: 500 tokens, 50/s, 50% done, 0:00:10 left; now code, 83%",
        "teacher: 600 tokens, 30/s, 60% done, 0:00:13 left; now code, 100%",
        "teacher: 800 tokens, 27/s, 80% done, 0:00:07 left; now law, 50%",
        "teacher: 1,000 tokens in 0:00:40, 25/s",
    ]


def test_a_part_that_ends_early_shortens_the_whole(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with meter("tokenising", "tokens", parts={"small": 1_000, "done before": 500, "large": 300}) as shown:
        shown.advance(100, "small")
        shown.end("small")
        shown.end("done before")
        clock[0] = 10
        shown.advance(100, "large")
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 200 tokens, 20/s, 50% done, 0:00:10 left; now large, 33%",
        "tokenising: 200 tokens in 0:00:10, 20/s",
    ]


def test_without_an_end_nothing_is_said_to_be_left(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with meter("tokenising", "tokens", parts={"stream": None, "file": 300}) as shown:
        clock[0] = 10
        shown.advance(1_000, "stream")
    assert capsys.readouterr().err.splitlines() == [
        "tokenising: 1,000 tokens, 100/s; now stream, 1,000",
        "tokenising: 1,000 tokens in 0:00:10, 100/s",
    ]


def test_a_terminal_keeps_what_was_done() -> None:
    """The whole and each part, with amounts and seconds, not with 100% and nothing left alone."""
    main, side = pty.openpty()
    script = """
from ddk_cache.progress import meter
with meter("teacher", "tokens", parts={"code": 1_000, "law": 4_000}) as shown:
    shown.advance(1_000, "code")
    shown.advance(2_500, "law")
"""
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "120", "NO_COLOR": "1"}
    subprocess.run([sys.executable, "-c", script], stderr=side, check=True, env=environment)
    os.close(side)
    frame = os.read(main, 1 << 16).decode().rpartition("\x1b[2K")[2]
    os.close(main)
    pattern = r"^ *(\w+) +━+ 100% +([\d,]+) tokens +[\d,]+/s +in 0:00:00\r$"
    assert re.findall(pattern, frame, re.MULTILINE) == [
        ("teacher", "3,500"),
        ("code", "1,000"),
        ("law", "2,500"),
    ]
