"""Wrap functions to act at their n-th call, such as to kill the process."""

import os
import signal
from collections.abc import Callable
from typing import Any


def at_call(nth: int, function: Any, act: Callable[[], object], *, after: bool = False) -> Any:
    """Return ``function`` that calls ``act`` before its ``nth`` call, or ``after`` it."""
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth and not after:
            act()
        result = function(*args, **kwargs)
        if calls == nth and after:
            act()
        return result

    return counting


def die_at_call(nth: int, function: Any, *, after: bool = False) -> Any:
    """Return ``function`` whose ``nth`` call kills the process (SIGKILL)."""
    return at_call(nth, function, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
