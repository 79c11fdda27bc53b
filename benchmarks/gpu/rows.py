"""Rows in the order of their importance, which are measured if they fit into the time."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.budget import Deadline, OutOfTimeError, alarm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from benchmarks.gpu.record import Record

__all__ = ["NO_TIME", "Row", "take"]

# Usually a row takes at most so many times the median of its kind; the first ones load what later ones reuse.
MARGIN = 1.3
NO_TIME = "no time"


@dataclass(frozen=True)
class Row:
    """One small measurement.

    Attributes:
        measure: called with a deadline; returns the values of the row.
        kind: rows of one kind take about the same time.
        guess: seconds of the first row of its kind.
        about: values of the row in all cases, such as the name of a network.
    """

    name: str
    measure: Callable[[Deadline], dict[str, Any]]
    kind: str
    guess: float
    about: dict[str, Any]


def take(rows: Iterable[Row], deadline: Deadline, record: Record, clean: Callable[[], None] = lambda: None) -> None:
    """Measure the rows that fit, in their order. A failure is recorded with its reason, and the next row follows.

    Args:
        clean: called after an incomplete row, to free its memory.
    """
    for row in rows:
        if record.has(row.name):
            continue
        before = record.seconds_of(row.kind)
        expected = MARGIN * statistics.median(before) if before else row.guess
        if not deadline.fits(expected):
            reason = f"{NO_TIME}: {expected:.0f} s expected, {max(deadline.remaining(), 0):.0f} s left"
            record.add(row.name, "skipped", **row.about, reason=reason)
            continue
        started = time.monotonic()
        status, values = _measured(row, deadline)
        seconds = time.monotonic() - started
        record.add(row.name, status, **row.about | values, kind=row.kind, seconds=round(seconds, 2))
        print(f"{status} in {seconds:.1f} s ({max(deadline.remaining(), 0):.0f} s left): {row.name}", flush=True)
        if status != "measured":
            print(f"  {values['reason']}", flush=True)
            clean()


def _measured(row: Row, deadline: Deadline) -> tuple[str, dict[str, Any]]:
    try:
        with alarm(deadline.remaining()):
            return "measured", row.measure(deadline)
    except OutOfTimeError:
        return "cut", {"reason": NO_TIME}
    except Exception as error:  # noqa: BLE001 a failure of one row, such as out of memory, must not end the others
        text = str(error).strip().splitlines() or [""]
        return "failed", {"reason": f"{type(error).__name__}: {text[0][:300]}"}
