"""A function that does something else when it is called for the n-th time, such as to kill its process."""

import os
import signal
from collections.abc import Callable
from typing import Any


def at_call(number: int, function: Any, act: Callable[[], object], *, after: bool = False) -> Any:
    """``function``, but its ``number``-th call does ``act`` first, or ``after`` it."""
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
    """``function``, but the process kills itself (SIGKILL) at its ``number``-th call."""
    return at_call(number, function, lambda: os.kill(os.getpid(), signal.SIGKILL), after=after)
