"""Samples to be looked at: the teacher's ODE and its student from the same noises, and between two noises."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.solvers import endpoint
from fmm_distill.evaluation.draws import NOISE_SEED, draw_samples_of
from fmm_distill.evaluation.pictures import still
from fmm_distill.student.sampling import sample

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.student.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["COLUMNS", "SEED", "Gallery", "between"]

COLUMNS = 12
# Other noises than those that are measured.
SEED = NOISE_SEED + 1


class Gallery:
    """Noises of one seed, and where the teacher's ODE takes them.

    Args:
        solver_steps: RK4 steps of the teacher's ODE.

    Attributes:
        name: of the row of the ODE.
    """

    name = "teacher's ODE"

    def __init__(self, teacher: Teacher, solver_steps: int, count: int, seed: int, device: torch.device) -> None:
        draws = draw_samples_of(teacher, range(count), seed, device)
        self.teacher, self.solver_steps = teacher, solver_steps
        self.noise, self.cond = draws.noise, draws.cond
        self.truth = self._solved(self.noise)

    @torch.no_grad()
    def _solved(self, noise: Tensor) -> Tensor:
        prior = self.teacher.prior(noise)
        return endpoint(self.teacher.velocity, self.teacher.schedule, prior, self.solver_steps, self.cond)

    def rows(self, student: Student, steps: tuple[int, ...]) -> dict[str, Float[Tensor, "count channels height width"]]:
        """The teacher's row, and one for each number of the student's steps; decoded, in [-1, 1], on the CPU."""
        return self._shown(student, steps, self.noise, self.truth)

    def interpolation(
        self, student: Student, steps: tuple[int, ...]
    ) -> dict[str, Float[Tensor, "count channels height width"]]:
        """The same rows for noises on the way from the first noise to the second, told what the first is told."""
        if self.cond is not None:
            self.cond = self.cond.rows(torch.zeros(len(self.noise), dtype=torch.long))
        noise = between(self.noise[0], self.noise[1], len(self.noise))
        return self._shown(student, steps, noise, self._solved(noise))

    @torch.no_grad()
    def _shown(self, student: Student, steps: tuple[int, ...], noise: Tensor, truth: Tensor) -> dict[str, Tensor]:
        rows = {self.name: truth}
        rows |= {f"student, {n}": sample(student, noise, n, self.cond) for n in steps}
        return {name: still(self.teacher.codec.decode(x).cpu()) for name, x in rows.items()}


def between(one: Float[Tensor, "*event"], other: Float[Tensor, "*event"], count: int) -> Float[Tensor, "batch *event"]:
    """Noises on the quarter circle from one to another: of independent ones each is N(0, I) again, as on a line not."""
    angles = torch.linspace(0, math.pi / 2, count, dtype=torch.float64, device=one.device)
    shape = (count, *(1 for _ in one.shape))
    mixed = angles.cos().reshape(shape) * one + angles.sin().reshape(shape) * other
    return mixed.to(one.dtype)
