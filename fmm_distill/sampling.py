"""N jumps from noise to data."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

from fmm_distill.errors import UserError
from fmm_distill.interpolant import expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.interpolant import Schedule
    from fmm_distill.student import Student

__all__ = ["grid", "sample"]


def grid(schedule: Schedule, steps: int) -> Float[Tensor, " points"]:
    """Times of a grid that is uniform in timesteps: the stock DDIM grid with trailing spacing, and data at its end.

    Where ``steps`` does not divide the timesteps, halves are rounded to even; stock rounds some the other way.

    Shape ``[steps + 1]``, float64, decreasing.

    Raises:
        UserError: if there are more steps than timesteps, or none.
    """
    n = schedule.num_timesteps
    if not 1 <= steps <= n:
        raise UserError(f"{steps} sampling steps; wanted 1 to {n}, the teacher's number of timesteps")
    remaining = torch.arange(steps, -1, -1, dtype=torch.float64) * n / steps
    return schedule.time(remaining.round().long() - 1)


@torch.no_grad()
def sample(student: Student, noise: Float[Tensor, "batch *event"], steps: int) -> Float[Tensor, "batch *event"]:
    """Images in the teacher's range from its own x_T ~ N(0, I), by ``steps`` jumps of the student's map."""
    times = grid(student.schedule, steps).to(noise.device)
    x = noise / expand(student.schedule.scale(times[:1]), noise)
    for t, r in pairwise(times):
        x = student(x, t.expand(len(x)), r.expand(len(x)))
    return x
