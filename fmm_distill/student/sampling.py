"""Sampling: N jumps of a student from noise to data."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student

__all__ = ["sample"]


@torch.no_grad()
def sample(
    student: Student,
    noise: Float[Tensor, "batch *event"],
    steps: int | Float[Tensor, " points"],
    cond: Conditioning | None = None,
) -> Float[Tensor, "batch *event"]:
    """Return samples on the teacher's axis (latents, for a latent teacher), made by ``steps`` jumps of the student.

    Args:
        noise: draws from N(0, I).
        steps: number of jumps on the schedule's own grid, or the times between which to jump, from t_max to 0.

    Raises:
        UserError: if there are no steps, or more steps than timesteps.
    """
    times = (student.schedule.grid(steps) if isinstance(steps, int) else steps).to(noise.device)
    # N(0, I) in the teacher's variables; here at t_max its scale is another one.
    x = student.parametrization.prior(noise)
    with student.equal_jumps():
        for t, r in pairwise(times):
            x = student(x, t.expand(len(x)), r.expand(len(x)), cond)
    return x
