"""What the command says where it cannot go on: one line from every process, whatever ended it."""

import logging
import sys

import click
import pytest

from ddk_cache import cli
from ddk_cache.errors import CacheError, counted


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (CacheError("bad\x1b[2J name\u202e"), 1, "bad\\x1b[2J name\\u202e"),
        (MemoryError("Unable to allocate 8.00 TiB"), 1, "out of memory: Unable to allocate 8.00 TiB"),
        (MemoryError(), 1, "out of memory"),
        (RecursionError(), 1, "something is nested too deep"),
        (RuntimeError("can't start new thread"), 1, "out of memory: can't start new thread"),
        (ImportError("libx.so: failed to map segment"), 1, "out of memory: libx.so: failed to map segment"),
    ],
)
@pytest.mark.parametrize(
    ("rank", "processes", "whose"), [("0", "4", ""), ("3", "4", "[rank 3] "), ("0", "1", "")]
)
def test_every_process_says_its_own_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    code: int,
    line: str,
    rank: str,
    processes: str,
    whose: str,
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
    assert capsys.readouterr().err == f"Error: {whose}{line}\n"


def test_a_library_does_not_speak_of_kernels_that_are_not_used() -> None:
    """bitsandbytes, which peft imports, would warn that it lacks gemm_4bit's."""
    cli._quiet_libraries()
    assert not logging.getLogger("bitsandbytes.backends.cpu.ops").isEnabledFor(logging.WARNING)


@pytest.mark.parametrize(("number", "said"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_one_is_no_plural(number: int, said: str) -> None:
    assert counted(number, "row") == said
