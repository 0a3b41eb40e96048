"""A function that kills its own process (SIGKILL) when it is called for the n-th time."""

import os
import signal
from typing import Any


def die_at_call(number: int, function: Any, *, after: bool = False) -> Any:
    """``function``, but its ``number``-th call is the process's last; ``after``: that call is still made."""
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls < number:
            return function(*args, **kwargs)
        if after:
            function(*args, **kwargs)
        return os.kill(os.getpid(), signal.SIGKILL)

    return counting
