"""Rows in order of importance, each measured if it fits."""

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

# A row takes at most so much longer than the median of its kind, as a rule; the first ones load what later ones share.
MARGIN = 1.3
NO_TIME = "no time"


@dataclass(frozen=True)
class Row:
    """One small measurement.

    Attributes:
        measure: called with the moment by which it has to be complete; returns the row's values.
        kind: rows of one kind take about equally long.
        guess: seconds of the first row of its kind.
        about: values that belong to the row whatever comes of it, such as the name of a network.
    """

    name: str
    measure: Callable[[Deadline], dict[str, Any]]
    kind: str
    guess: float
    about: dict[str, Any]


def take(rows: Iterable[Row], deadline: Deadline, record: Record, clean: Callable[[], None] = lambda: None) -> None:
    """Measure the rows that fit, in their order. A row that fails is recorded with the reason and ends nothing.

    Args:
        clean: called after a row that did not complete, to free what it held.
    """
    for row in rows:
        if record.has(row.name):
            continue
        before = record.seconds_of(row.kind)
        expected = MARGIN * statistics.median(before) if before else row.guess
        if not deadline.fits(expected):
            reason = f"{NO_TIME}: {expected:.0f} s expected, {max(deadline.remaining(), 0):.0f} s left"
            record.keep(row.name, "skipped", **row.about, reason=reason)
            continue
        started = time.monotonic()
        status, values = _measured(row, deadline)
        seconds = time.monotonic() - started
        record.keep(row.name, status, **row.about | values, kind=row.kind, seconds=round(seconds, 2))
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
    except Exception as error:  # noqa: BLE001 one row's failure, out of memory above all, leaves the others their time
        text = str(error).strip().splitlines() or [""]
        return "failed", {"reason": f"{type(error).__name__}: {text[0][:300]}"}
