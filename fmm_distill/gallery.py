"""Samples to be looked at: the teacher's ODE and its student from the same noises."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.evaluate import NOISE_SEED, conditions_of
from fmm_distill.pictures import still
from fmm_distill.sampling import sample
from fmm_distill.solve import endpoint

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.student import Student
    from fmm_distill.teachers.base import Teacher

__all__ = ["COLUMNS", "SEED", "Gallery"]

COLUMNS = 12
# Other noises than those that are measured.
SEED = NOISE_SEED + 1


class Gallery:
    """Noises of one seed, and where the teacher's ODE takes them.

    Args:
        solver_steps: RK4 steps of the teacher's ODE.
    """

    @torch.no_grad()
    def __init__(self, teacher: Teacher, solver_steps: int, count: int, seed: int, device: torch.device) -> None:
        self.teacher = teacher
        generator = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(count, *teacher.event_shape, generator=generator).to(device)
        cond = conditions_of(teacher, count, seed)
        self.cond = None if cond is None else cond.to(device)
        prior = teacher.prior(self.noise)
        self.truth = endpoint(teacher.velocity, teacher.schedule, prior, solver_steps, self.cond)

    @torch.no_grad()
    def rows(self, student: Student, steps: tuple[int, ...]) -> dict[str, Float[Tensor, "count channels height width"]]:
        """The teacher's row, and one for each number of the student's steps; decoded, in [-1, 1], on the CPU."""
        rows = {"teacher's ODE": self.truth}
        rows |= {f"student, {n}": sample(student, self.noise, n, self.cond) for n in steps}
        return {name: still(self.teacher.codec.decode(x).cpu()) for name, x in rows.items()}
