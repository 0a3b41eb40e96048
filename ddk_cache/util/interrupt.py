"""What SIGTERM (schedulers, spot machines) and SIGINT do: a build stops at once, a run after its step.

After that a second SIGINT kills. A second SIGTERM does not: a scheduler sends it to all processes of a job,
and their parents pass it on; it kills by SIGKILL. Only the main thread may handle signals: in other threads,
as in some notebooks, nothing changes.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from signal import Signals
from types import FrameType
from typing import Any


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], Any], *stops: Signals) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {stop: signal.signal(stop, handler) for stop in stops}
    try:
        yield
    finally:
        for stop, previous in before.items():
            signal.signal(stop, previous)


class Stopped(BaseException):
    """A signal stopped the command. A BaseException, so that no handler of errors catches it."""

    def __init__(self, received: int) -> None:
        super().__init__(
            f"stopped by {Signals(received).name}: what is finished is kept; run the same command again to "
            "resume"
        )
        self.exit_code = 128 + received  # the convention of shells


@contextmanager
def stopping() -> Iterator[None]:
    """Raise ``Stopped`` on the first signal, so that the lock is released."""

    def stop(received: int, frame: FrameType | None) -> None:
        signal.signal(Signals.SIGTERM, signal.SIG_IGN)
        signal.signal(Signals.SIGINT, signal.SIG_DFL)
        raise Stopped(received)

    with _handled_by(stop, Signals.SIGTERM, Signals.SIGINT):
        yield


@dataclass
class Interrupt:
    """The first signal that asked this process to stop."""

    signal: Signals | None = None


@contextmanager
def catch_signals(*, once: bool) -> Iterator[Interrupt]:
    """Record the first signal of the block.

    With ``once`` a second SIGINT acts as before the block. Several processes must survive the signals of both
    terminal and torchrun, so there it is False.
    """
    interrupt = Interrupt()

    def record(received: int, frame: FrameType | None) -> None:
        interrupt.signal = interrupt.signal or Signals(received)
        if once:
            terminal.close()

    with _handled_by(record, Signals.SIGTERM), ExitStack() as terminal:
        terminal.enter_context(_handled_by(record, Signals.SIGINT))
        yield interrupt
