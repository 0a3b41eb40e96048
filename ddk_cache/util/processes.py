"""The start of a worker process, on this machine or on another."""

import multiprocessing
import os
import signal
import threading
from contextlib import suppress


def follow_parent() -> None:
    """Make a new worker ignore Ctrl-C, which its parent handles, and exit as soon as its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def enter_folder(folder: str) -> None:
    """Change to ``folder``, the command's, which relative paths refer to; another machine may not have it."""
    with suppress(FileNotFoundError):
        os.chdir(folder)


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
