"""Compare two evaluations: values that changed beyond their standard errors, for better or worse."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmm_distill.errors import UserError
from fmm_distill.evaluation.protocol import differences
from fmm_distill.evaluation.result import COLUMNS, Evaluation, Row, from_json, is_of_teacher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from fmm_distill.evaluation.result import Column

__all__ = ["Change", "Comparison", "compare", "format_comparison", "read_result"]

# In standard errors: 95 % intervals, and a threshold that chance exceeds once in 370 comparisons.
INTERVAL = 1.96
THRESHOLD = 3.0


@dataclass(frozen=True)
class Change:
    """A quantity of one sampler at one number of steps, before and after.

    Attributes:
        errors: standard errors of both; None: unknown, so that any difference counts.
    """

    sampler: str
    steps: int
    column: Column
    before: float
    after: float
    errors: tuple[float | None, float | None]

    @property
    def of_student(self) -> bool:
        """True for rows other than the teacher's."""
        return not is_of_teacher(self.sampler)

    @property
    def judged(self) -> bool:
        """True for a student's quantity that depends on the samples alone."""
        return self.of_student and self.column.judged

    @property
    def error(self) -> float | None:
        """Standard error of the difference; an upper estimate, since both sets have the same noises."""
        one, other = self.errors
        # Errors of independent sets add in squares; a common noise only makes the true error smaller.
        return None if one is None or other is None else math.hypot(one, other)

    @property
    def moved(self) -> bool:
        """True if the difference exceeds its threshold."""
        if math.isnan(self.before) or math.isnan(self.after):
            return not (math.isnan(self.before) and math.isnan(self.after))
        difference = abs(self.after - self.before)
        # Rounding differs between machines.
        if difference <= 1e-6 * max(abs(self.before), abs(self.after), 1e-12):
            return False
        return self.error is None or difference > THRESHOLD * self.error

    @property
    def worse(self) -> bool:
        """True if it moved in the wrong direction, or became NaN."""
        if math.isnan(self.before) or math.isnan(self.after):
            return self.moved and math.isnan(self.after)
        falls = self.after < self.before
        return self.moved and falls == (self.column.better == "higher")


@dataclass(frozen=True)
class Comparison:
    """The differences between two evaluations.

    Attributes:
        different: protocol entries that differ.
        missing: rows of students, and quantities of any row, that the second evaluation lacks.
    """

    changes: tuple[Change, ...]
    different: dict[str, tuple[object, object]]
    missing: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """True if a judged quantity is worse."""
        return any(change.worse and change.judged for change in self.changes)


def read_result(path: Path) -> Evaluation:
    """Return the evaluation of a JSON file.

    Raises:
        UserError: if the file is not an evaluation.
    """
    expected = "expected a file of fmm-distill evaluate --output, or the evaluation.json of a run"
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {expected}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error}); {expected}") from error


def compare(before: Evaluation, after: Evaluation, *, across_protocols: bool = False) -> Comparison:
    """Compare all quantities that both evaluations have.

    Args:
        across_protocols: compare evaluations with different protocols; the comparison lists the differences.

    Raises:
        UserError: if the protocols differ without ``across_protocols``, or no row is in both.
    """
    different = differences(before.protocol, after.protocol)
    if different and not across_protocols:
        shown = "; ".join(f"{key}: first {a}, second {b}" for key, (a, b) in different.items())
        raise UserError(
            f"expected two evaluations with one protocol, got a difference in {shown}; evaluate both in the same way, "
            "or try --across-protocols"
        )
    old = {(row.sampler, row.steps): row for row in before.rows}
    new = {(row.sampler, row.steps): row for row in after.rows}
    shared = [key for key in old if key in new]
    if not shared:
        raise UserError(
            f"expected rows in common, got first {_names(before)}, second {_names(after)}; evaluate the same samplers "
            "at the same numbers of steps"
        )
    changes = tuple(change for key in shared for change in _changes(old[key], new[key]))
    missing = [f"{name}, {steps}" for name, steps in old if (name, steps) not in new and not is_of_teacher(name)]
    missing += [
        f"{name}, {steps}: {column.title}"
        for name, steps in shared
        for column in COLUMNS
        if getattr(old[name, steps], column.key) is not None and getattr(new[name, steps], column.key) is None
    ]
    return Comparison(changes, different, tuple(missing))


def _names(evaluation: Evaluation) -> str:
    return ", ".join(dict.fromkeys(f"{row.sampler} at {row.steps}" for row in evaluation.rows))


def _changes(before: Row, after: Row) -> Iterator[Change]:
    for column in COLUMNS:
        one, other = getattr(before, column.key), getattr(after, column.key)
        if one is None or other is None:
            continue
        errors = before.errors.get(column.key), after.errors.get(column.key)
        yield Change(before.sampler, before.steps, column, one, other, errors)


def format_comparison(comparison: Comparison) -> str:
    """Return the comparison as text: values with 95 % intervals and verdicts."""
    lines = [f"different protocols: {key}: first {a}, second {b}" for key, (a, b) in comparison.different.items()]
    lines += [f"missing in the second: {name}" for name in comparison.missing]
    lines.append(f"{'sampler':<20}{'steps':>6}  {'quantity':<16}{'before':>28} {'after':>28}  verdict")
    # A teacher's value that moved means that the measurement changed, not the student.
    for change in (
        change for change in comparison.changes if change.of_student or (change.moved and change.column.judged)
    ):
        numbers = zip((change.before, change.after), change.errors, strict=True)
        before, after = (_with_interval(value, error, change.column.form) for value, error in numbers)
        name = f"{change.sampler:<20}{change.steps:>6}  {change.column.title:<16}"
        lines.append(f"{name}{before:>28} {after:>28}  {_verdict(change)}")
    worse = sum(change.worse and change.judged for change in comparison.changes)
    lines.append(f"student: {worse or 'no'} {'value is' if worse <= 1 else 'values are'} worse")
    return "\n".join(lines)


def _with_interval(value: float, error: float | None, form: str) -> str:
    if error is None:
        return format(value, form)
    return f"{value:{form}} [{value - INTERVAL * error:{form}}, {value + INTERVAL * error:{form}}]"


def _verdict(change: Change) -> str:
    if not change.column.judged:
        return "not judged (depends on the machine)"
    if not change.moved:
        return "same"
    direction = "worse" if change.worse else "better"
    return direction if change.judged else f"{direction} (teacher, not judged)"
