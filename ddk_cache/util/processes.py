"""The start of a worker process."""

import multiprocessing
import os
import signal
import threading


def follow_parent() -> None:
    """Make a new worker ignore Ctrl-C, which its parent handles, and exit as soon as its parent does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
