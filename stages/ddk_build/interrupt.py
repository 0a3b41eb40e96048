"""SIGTERM (schedulers, spot machines) and SIGINT end a build at once: what its markers vouch for is kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """The build was told to stop; no error, so that nothing on the way takes it for one."""

    def __init__(self, number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(number).name}: every finished shard is kept; the same command again "
            "goes on from there"
        )
        self.exit_code = 128 + number  # as a shell says it


@contextmanager
def stopping() -> Iterator[None]:
    """Inside, SIGTERM and SIGINT raise ``Stopped``, so that the lock is given back; a second one kills.

    Only the main thread may handle signals: elsewhere, as in some notebooks, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(number: int, frame: FrameType | None) -> None:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise Stopped(number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
