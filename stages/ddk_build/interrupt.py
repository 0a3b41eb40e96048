"""SIGTERM (schedulers, spot machines) and SIGINT end a build at once; its finished shards are kept."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stopped(BaseException):
    """A signal stopped the build. A BaseException, so that no handler of errors catches it."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name}: every finished shard is kept; run the same "
            "command again to resume"
        )
        self.exit_code = 128 + signal_number  # the convention of shells


@contextmanager
def stopping() -> Iterator[None]:
    """Raise ``Stopped`` on SIGTERM and SIGINT, so that the lock is released; a second signal kills.

    Only the main thread may handle signals: in other threads, as in some notebooks, nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def stop(signal_number: int, frame: FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        raise Stopped(signal_number)

    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
