"""The strengths of a scaled student's change in the pipelines of an export."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

from fmm_distill.student.scaled import is_scaled
from fmm_distill.student.strength import strength_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from fmm_distill.export.exporter import Exporter, PipelineExporter
    from fmm_distill.student.strength import Strength
    from fmm_distill.student.student import Student

__all__ = ["check_strengths", "strengths_of"]


def strengths_of(student: Student, exporter: Exporter, steps: Sequence[int]) -> dict[int, Strength]:
    """Return the strength of a scaled student's changes in each pipeline of a fixed number of steps."""
    if exporter.not_fixed or not is_scaled(student.network):
        return {}
    return {n: strength_of(student, cast("PipelineExporter", exporter).fixed_grid(student, n)) for n in steps}


def check_strengths(student: Student, exporter: Exporter, steps: Sequence[int]) -> None:
    """Refuse numbers of steps whose jumps are too different for a scaled student with one set of weights.

    Raises:
        UserError: with the first such number.
    """
    for n, strength in strengths_of(student, exporter, steps).items():
        strength.check(n)
