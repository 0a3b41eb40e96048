"""A library leaves the process that imports it as it was."""

import subprocess
import sys

SCRIPT = """
import logging, pkgutil, signal, sys, warnings
import numpy, obstore, pyarrow.parquet, pydantic, yaml, zarr, rich.progress, numcodecs.zarr3  # have effects

def state():
    handlers = [signal.getsignal(number) for number in signal.valid_signals()]
    loggers = logging.root.manager.loggerDict.items()
    loggers = [(name, log) for name, log in loggers if isinstance(log, logging.Logger)]
    theirs = {name: (log.level, list(log.handlers)) for name, log in loggers}
    theirs = {name: value for name, value in theirs.items() if not name.startswith("ddk_")}
    return list(warnings.filters), handlers, list(logging.root.handlers), theirs

before = state()
import ddk_cache
for name in ddk_cache.__all__:
    getattr(ddk_cache, name)
for module in pkgutil.walk_packages(ddk_cache.__path__, "ddk_cache."):
    __import__(module.name)
after = state()
for was, now in zip(before[:3], after[:3]):
    assert was == now, (was, now)
for name, value in before[3].items():
    assert after[3][name] == value, name
assert not any(handlers for name, (_, handlers) in after[3].items() if name not in before[3])
"""


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "ddk_cache", "recipes"], capture_output=True, text=True, check=True
    )
    assert "start" in done.stdout


def test_an_import_changes_nothing_in_the_process() -> None:
    """No warning filter, signal handler or log handler, and no output."""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
