"""Functions that do something else at their n-th call, such as killing their process."""

import os
import signal
from collections.abc import Callable
from typing import Any


def at_call(number: int, function: Any, act: Callable[[], object], *, after: bool = False) -> Any:
    """Return ``function`` with ``act`` done before its ``number``-th call, or ``after`` it."""
    calls = 0

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not after:
            act()
        result = function(*args, **kwargs)
        if calls == number and after:
            act()
        return result

    return counting


def die_at_call(number: int, function: Any, *, after: bool = False) -> Any:
    """Return ``function``, but its ``number``-th call kills the process (SIGKILL)."""
    return at_call(number, function, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
