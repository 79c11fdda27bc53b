"""SIGTERM and Ctrl-C as requests to stop: the step ends, and a checkpoint is written."""

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
    """A run has stopped on a signal, after it saved a checkpoint.

    Attributes:
        signal: number of the signal.
    """

    def __init__(self, step: int, number: int) -> None:
        name = signal.Signals(number).name
        super().__init__(f"stopped by {name} after step {step}, which is saved; the same command resumes from there")
        self.signal = number


@dataclass
class StopRequest:
    """A request to stop this process.

    Attributes:
        signal: number of the signal; 0: there was none.
    """

    signal: int = 0


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Turn the first SIGTERM or Ctrl-C into a request; a second one interrupts at once.

    Outside the main thread Python can't install handlers, and the signals have their usual effect.
    """
    request = StopRequest()

    def handle(number: int, _: FrameType | None) -> None:
        if request.signal:
            raise KeyboardInterrupt
        request.signal = number

    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    # getsignal returns None for a handler that Python did not install, which could not be restored.
    taken = [number for number in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(number) is not None]
    before = {number: signal.signal(number, handle) for number in taken}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
