"""Record SIGTERM (schedulers, spot machines) and SIGINT, so that a run stops after a step."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType


@dataclass
class Interrupt:
    """The first signal that asked this process to stop."""

    signal: Signals | None = None


@contextmanager
def catch_signals(*, once: bool) -> Iterator[Interrupt]:
    """Record the first SIGTERM or SIGINT of the block; do nothing outside the main thread.

    With ``once`` the second signal acts as before. Not for one of several processes, which must survive the
    signals of both terminal and torchrun.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return

    def restore() -> None:
        for received, handler in handlers.items():
            signal.signal(received, handler)

    def record(received: int, frame: FrameType | None) -> None:
        interrupt.signal = interrupt.signal or Signals(received)
        if once:
            restore()

    handlers = {stop: signal.signal(stop, record) for stop in (Signals.SIGTERM, Signals.SIGINT)}
    try:
        yield interrupt
    finally:
        restore()
