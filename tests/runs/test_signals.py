"""Signals stop a run at a step boundary; the handlers are restored."""

import signal
import threading

import pytest

from fusedlm.runs.signals import StopSignal

NUMBERS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]


@pytest.fixture(autouse=True)
def handlers():
    """Whatever a test does, this process has its handlers again."""
    before = [signal.getsignal(number) for number in NUMBERS]
    yield before
    for number, handler in zip(NUMBERS, before, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("number", NUMBERS)
def test_the_first_signal_is_received_and_the_handlers_are_restored(number, handlers):
    with StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(number)
        assert stop.received is number
        assert [signal.getsignal(n) for n in NUMBERS[:2]] == handlers[:2]
    assert [signal.getsignal(n) for n in NUMBERS] == handlers


@pytest.mark.parametrize("first", NUMBERS)
def test_a_closed_terminal_may_signal_again(first):
    """Each process of a closed terminal gets SIGHUP from the shell and from the system, also while it saves."""
    with StopSignal() as stop:
        signal.raise_signal(first)
        signal.raise_signal(signal.SIGHUP)
        signal.raise_signal(signal.SIGHUP)
    assert stop.received is first


@pytest.mark.parametrize("number", NUMBERS)
def test_an_ignored_signal_stays_ignored(number):
    signal.signal(number, signal.SIG_IGN)
    with StopSignal() as stop:
        signal.raise_signal(number)
        assert signal.getsignal(number) is signal.SIG_IGN
    assert stop.received is None and signal.getsignal(number) is signal.SIG_IGN


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
