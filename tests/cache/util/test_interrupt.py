"""Signals: the first stops, SIGTERM again is the same request, SIGINT again kills."""

import signal

import pytest

from ddk_cache.util.interrupt import Stopped, catch_signals, stopping


def test_a_run_hears_sigterm_twice_as_once_and_a_second_sigint_kills() -> None:
    with catch_signals(once=True) as interrupt:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert interrupt.signal is signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_second_sigterm_does_not_disturb_the_end_of_a_build() -> None:
    with stopping():
        with pytest.raises(Stopped, match="what is finished is kept; run the same command again") as stopped:
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
