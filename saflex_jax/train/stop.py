"""Ctrl-C and SIGTERM as a request to stop that the running work polls."""

from __future__ import annotations

import signal
import threading
from collections.abc import Sequence


class StopRequest:
    """Context that notes signals instead of ending the process; restores the handlers on exit.

    >>> with StopRequest() as stop:
    ...     signal.raise_signal(signal.SIGTERM)
    ...     stop.signal
    <Signals.SIGTERM: 15>

    Outside the main thread Python allows no handlers, and it notes nothing.

    Args:
      numbers: signals to note.
      second_interrupts: whether SIGINT after a first signal raises KeyboardInterrupt.

    Attributes:
      signal: the last signal received; None before any.
    """

    def __init__(
        self,
        numbers: Sequence[signal.Signals] = (signal.SIGINT, signal.SIGTERM),
        *,
        second_interrupts: bool = True,
    ):
        self.signal: signal.Signals | None = None
        self._numbers, self._second_interrupts = numbers, second_interrupts

    def _handle(self, number, frame):
        if self._second_interrupts and self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = signal.Signals(number)

    def __enter__(self) -> StopRequest:
        is_main = threading.current_thread() is threading.main_thread()
        self._previous = {
            number: signal.signal(number, self._handle) for number in self._numbers if is_main
        }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
