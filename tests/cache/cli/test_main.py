"""An error of a command is one line from every process."""

import logging
import sys

import click
import pytest

from ddk_cache.cli import main as cli
from ddk_cache.errors import CacheError, counted


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CacheError("bad\x1b[2J name\u202e"), 1, "bad\\x1b[2J name\\u202e"),
        (MemoryError("Unable to allocate 8.00 TiB"), 1, "out of memory: Unable to allocate 8.00 TiB"),
        (CacheError("a" + 999 * "b"), 1, "a" + 999 * "b"),
        (CacheError(750 * "a" + 9000 * "b" + 250 * "c"), 1, f"{750 * 'a'} ... {250 * 'c'}"),
        (MemoryError(), 1, "out of memory"),
        (RecursionError(), 1, "something is nested too deep"),
        (RuntimeError("can't start new thread"), 1, "out of memory: can't start new thread"),
        (ImportError("libx.so: failed to map segment"), 1, "out of memory: libx.so: failed to map segment"),
    ],
)
@pytest.mark.parametrize(
    ("rank", "processes", "prefix"), [("0", "4", ""), ("3", "4", "[rank 3] "), ("0", "1", "")]
)
def test_every_process_prints_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
    rank: str,
    processes: str,
    prefix: str,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", processes)
    monkeypatch.setattr(sys, "argv", ["ddk-cache", "fail"])
    monkeypatch.setitem(cli.commands.commands, "fail", click.Command("fail", callback=fail))
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert end.value.code == code
    assert capsys.readouterr().err == f"Error: {prefix}{line}\n"


def test_bitsandbytes_does_not_warn_about_unused_kernels() -> None:
    """It is imported by peft, and would warn that gemm_4bit is missing."""
    cli._quiet_libraries()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(("count", "text"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_a_count_of_one_is_singular(count: int, text: str) -> None:
    assert counted(count, "row") == text
