"""Signals stop a run at a step boundary; the handlers are restored."""

import signal
import threading

import pytest

from fusedlm.runs.signals import StopSignal


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_received_and_the_handlers_are_restored(number):
    before = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received is number
        assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == before


def test_the_handlers_are_restored_after_an_error():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyError), StopSignal():
        assert signal.getsignal(signal.SIGINT) != before
        raise KeyError
    assert signal.getsignal(signal.SIGINT) is before


def test_other_threads_do_not_change_handlers():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def work():
        with StopSignal() as stop:
            seen.append((signal.getsignal(signal.SIGTERM), stop.received))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(before, None)]
