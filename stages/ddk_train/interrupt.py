"""SIGTERM (schedulers, spot machines) and SIGINT: noted, and acted upon where nothing is lost."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


@dataclass
class Interrupt:
    """Whether this process was asked to stop."""

    told: signal.Signals | None = None


@contextmanager
def noting(*, alone: bool) -> Iterator[Interrupt]:
    """Inside, a first SIGTERM or SIGINT is only noted.

    Parameters
    ----------
    alone
        A second one does what it did before. Of several processes each may be told twice, by the terminal
        and by torchrun, and must not die of it.
    """
    interrupt = Interrupt()
    if threading.current_thread() is not threading.main_thread():  # only that one may handle signals
        yield interrupt
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def note(number: int, frame: FrameType | None) -> None:
        interrupt.told = interrupt.told or signal.Signals(number)
        if alone:
            restore()

    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield interrupt
    finally:
        restore()
