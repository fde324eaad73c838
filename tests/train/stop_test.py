import signal
import threading

import pytest

from saflex_jax.train import StopRequest

BOTH = (signal.SIGINT, signal.SIGTERM)


def handlers():
    return [signal.getsignal(number) for number in BOTH]


@pytest.mark.parametrize("number", BOTH)
def test_a_signal_is_noted_and_the_handlers_come_back(number):
    before = handlers()
    with StopRequest() as stop:
        assert stop.signal is None
        signal.raise_signal(number)
        assert stop.signal == number
    assert handlers() == before


def test_the_second_ctrl_c_interrupts_unless_told_otherwise():
    before = handlers()
    for first in BOTH:
        with pytest.raises(KeyboardInterrupt), StopRequest() as stop:
            signal.raise_signal(first)
            signal.raise_signal(signal.SIGTERM)  # never interrupts
            assert stop.signal == signal.SIGTERM
            signal.raise_signal(signal.SIGINT)
        assert handlers() == before
    with StopRequest(second_interrupts=False) as stop:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT


def test_only_the_given_signals_are_taken():
    before = handlers()
    with StopRequest([signal.SIGINT]):
        assert handlers()[1] == before[1] and handlers()[0] != before[0]


def test_another_thread_may_not_listen_but_may_run():
    before, during = handlers(), []

    def run():
        with StopRequest() as stop:
            during.append((handlers(), stop.signal))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert during == [(before, None)]
