"""Students whose jumps are random."""

from __future__ import annotations

from fmm_distill.run.trial import _with_random_jumps
from fmm_distill.student.student import Student


def randomized(student: Student) -> Student:
    """A copy whose jump differs from its teacher's steps, as in the trial before a training."""
    return _with_random_jumps(student).eval()
