"""Deadlines, and an alarm at the end of the time."""

from __future__ import annotations

import contextlib
import signal
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

__all__ = ["Deadline", "OutOfTimeError", "alarm"]


# Seconds between two alarms: longer than the clean-up after the first one.
_AGAIN = 1.0


class OutOfTimeError(BaseException):
    """The time is over. Not an ``Exception``: libraries that catch those fall back and continue."""


class Deadline:
    """A time by which work must be complete.

    Args:
        seconds: from the time of the call.
        clock: replaces the system's clock, for tests.
    """

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds

    def remaining(self) -> float:
        """Return the seconds until the deadline; negative after it."""
        return self._end - self._clock()

    def fits(self, seconds: float) -> bool:
        """Return whether work of so many seconds is complete by the deadline."""
        return seconds <= self.remaining()

    def within(self, seconds: float) -> Deadline:
        """Return a deadline in so many seconds, but not later than this one."""
        return Deadline(min(seconds, self.remaining()), self._clock)


@contextlib.contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise ``OutOfTimeError`` in the block when so many seconds are over, and again every second until it ends.

    Works in the main thread only. Python discards an exception that is raised in a callback of a weak reference, of
    which torch.compile has many: one alarm alone may be lost there.
    """

    def ring(*_: object) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, ring)
    # Zero disables the timer.
    signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3), _AGAIN)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
