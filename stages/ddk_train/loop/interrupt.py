"""Note SIGTERM (schedulers, spot machines) and SIGINT, and stop where no work is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType

STOP_SIGNALS = (Signals.SIGTERM, Signals.SIGINT)


@dataclass
class Interrupt:
    """The signal that asked this process to stop, if any."""

    signal: Signals | None = None


@contextmanager
def catch_signals(*, once: bool) -> Iterator[Interrupt]:
    """Only note the first SIGTERM or SIGINT while the context is active; then restore the handlers.

    Outside the main thread, which alone may handle signals, do nothing.

    Parameters
    ----------
    once
        The second signal acts as before. Not for one of several processes: the terminal and torchrun may
        both send it a signal, and it must survive them.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():
        yield interrupt
        return
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def restore() -> None:
        for number, handler in handlers.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.signal = interrupt.signal or Signals(number)
        if once:
            restore()

    for number in STOP_SIGNALS:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
