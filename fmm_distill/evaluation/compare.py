"""Two evaluations against one another: which values moved beyond their noise, and whether for the worse."""

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

# In standard errors: intervals are 95 %, and a difference of three, which chance makes once in 370, has moved.
INTERVAL = 1.96
MOVED = 3.0


@dataclass(frozen=True)
class Change:
    """A quantity of one sampler at one number of steps, before and after.

    Attributes:
        errors: standard errors of both; None: not known, so that any difference counts.
    """

    sampler: str
    steps: int
    column: Column
    before: float
    after: float
    errors: tuple[float | None, float | None]

    @property
    def of_student(self) -> bool:
        """Whether it is no row of the teacher's."""
        return not is_of_teacher(self.sampler)

    @property
    def judged(self) -> bool:
        """Whether it is a student's and depends on its samples."""
        return self.of_student and self.column.judged

    @property
    def error(self) -> float | None:
        """Standard error of the difference; the samples share their noises, so this is rather too large."""
        one, other = self.errors
        return None if one is None or other is None else math.hypot(one, other)

    @property
    def moved(self) -> bool:
        """Whether the difference is beyond the noise."""
        if math.isnan(self.before) or math.isnan(self.after):
            return not (math.isnan(self.before) and math.isnan(self.after))
        difference = abs(self.after - self.before)
        # Rounding of another machine is no change.
        if difference <= 1e-6 * max(abs(self.before), abs(self.after), 1e-12):
            return False
        return self.error is None or difference > MOVED * self.error

    @property
    def worse(self) -> bool:
        """Whether it moved the wrong way; what is no number any more did."""
        if math.isnan(self.before) or math.isnan(self.after):
            return self.moved and math.isnan(self.after)
        falls = self.after < self.before
        return self.moved and falls == (self.column.better == "higher")


@dataclass(frozen=True)
class Comparison:
    """What two evaluations have in common, and what they have not.

    Attributes:
        different: what their protocols don't share.
        missing: rows of a student, and numbers of any, that the second has not.
    """

    changes: tuple[Change, ...]
    different: dict[str, tuple[object, object]]
    missing: tuple[str, ...]

    @property
    def worse(self) -> bool:
        """Whether a judged value moved the wrong way."""
        return any(change.worse and change.judged for change in self.changes)


def read_result(path: Path) -> Evaluation:
    """An evaluation from its JSON.

    Raises:
        UserError: if the file is none.
    """
    wanted = "wanted what fmm-distill evaluate --output writes, or a run's evaluation.json"
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file; {wanted}") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: can't be read ({type(error).__name__}: {error}); {wanted}") from error


def compare(before: Evaluation, after: Evaluation, *, across_protocols: bool = False) -> Comparison:
    """Every quantity that both have, row by row.

    Args:
        across_protocols: compare numbers that were measured in different ways; the comparison says in which.

    Raises:
        UserError: if the protocols differ and that is not asked for, or if they share no row.
    """
    different = differences(before.protocol, after.protocol)
    if different and not across_protocols:
        shown = "; ".join(f"{key}: {a} there, {b} here" for key, (a, b) in different.items())
        raise UserError(
            f"the two were measured in different ways ({shown}): their numbers don't compare; measure both in one way, "
            "or --across-protocols to see them side by side"
        )
    kept = {(row.sampler, row.steps): row for row in before.rows}
    new = {(row.sampler, row.steps): row for row in after.rows}
    shared = [key for key in kept if key in new]
    if not shared:
        raise UserError(
            f"the two have no row in common ({_names(before)} there, {_names(after)} here); wanted the same samplers "
            "at the same numbers of steps"
        )
    changes = tuple(change for key in shared for change in _changes(kept[key], new[key]))
    missing = [f"{name}, {steps}" for name, steps in kept if (name, steps) not in new and not is_of_teacher(name)]
    missing += [
        f"{name}, {steps}: {column.title}"
        for name, steps in shared
        for column in COLUMNS
        if getattr(kept[name, steps], column.key) is not None and getattr(new[name, steps], column.key) is None
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
    """The comparison as text: values with their 95 % intervals, and what moved."""
    lines = [f"different protocols: {key}: {a} there, {b} here" for key, (a, b) in comparison.different.items()]
    lines += [f"not there any more: {name}" for name in comparison.missing]
    lines.append(f"{'sampler':<20}{'steps':>6}  {'quantity':<16}{'before':>28} {'after':>28}  verdict")
    # Of the teacher's rows, which are there to be compared with, those that should not have moved.
    for change in (
        change for change in comparison.changes if change.of_student or (change.moved and change.column.judged)
    ):
        numbers = zip((change.before, change.after), change.errors, strict=True)
        before, after = (_with_interval(value, error, change.column.form) for value, error in numbers)
        name = f"{change.sampler:<20}{change.steps:>6}  {change.column.title:<16}"
        lines.append(f"{name}{before:>28} {after:>28}  {_verdict(change)}")
    worse = sum(change.worse and change.judged for change in comparison.changes)
    lines.append(f"{worse} values of the student are worse" if worse else "no value of the student is worse")
    return "\n".join(lines)


def _with_interval(value: float, error: float | None, form: str) -> str:
    if error is None:
        return format(value, form)
    return f"{value:{form}} [{value - INTERVAL * error:{form}}, {value + INTERVAL * error:{form}}]"


def _verdict(change: Change) -> str:
    if not change.column.judged:
        return "not judged: the machine's"
    if not change.moved:
        return "same"
    direction = "worse" if change.worse else "better"
    return direction if change.judged else f"{direction}, of the teacher: not judged"
