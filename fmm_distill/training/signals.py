"""Stopping on request: the first SIGTERM or Ctrl-C lets the step end and a checkpoint be written."""

from __future__ import annotations

import signal
import threading
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fmm_distill.errors import FmmDistillError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

__all__ = ["StopRequest", "TrainingStoppedError", "stop_requests"]


class TrainingStoppedError(FmmDistillError):
    """A run was asked to stop, and has saved what it had.

    Attributes:
        signal: the signal's number.
    """

    def __init__(self, step: int, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved; the same command goes on from there")
        self.signal = number


@dataclass
class StopRequest:
    """Whether this process was asked to stop.

    Attributes:
        signal: the signal's number; 0: not asked.
    """

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turns the first SIGTERM or Ctrl-C into a request; a second one interrupts at once.

    Outside of the main thread, where Python takes no signals, they do what they did.
    """
    request = StopRequest()

    def ask(number: int, _: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # A handler that Python did not install can't be put back: it stays.
    taken = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, ask) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
