"""Sampling: N jumps of a student from noise to data, with fresh noise between them where it is chosen."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from diffusers.utils.torch_utils import randn_tensor

from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.student.student import Student

__all__ = ["check_stochasticity", "sample"]


@torch.no_grad()
def sample(
    student: Student,
    noise: Float[Tensor, "batch *event"],
    steps: int | Float[Tensor, " points"],
    cond: Conditioning | None = None,
    *,
    stochasticity: float = 0.0,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> Float[Tensor, "batch *event"]:
    """Return samples on the teacher's axis (latents, for a latent teacher), made by ``steps`` jumps of the student.

    With ``stochasticity`` s, a step from t to r jumps beyond r, and fresh noise takes the sample back to r. The samples
    of an exact map have the distribution of the data for every s. One is the noise of an ancestral sampler of DDPM; a
    large s is multistep consistency sampling, which jumps to data in every step.

    Args:
        noise: draws from N(0, I).
        steps: number of jumps on the schedule's own grid, or the times between which to jump, from t_max to 0.
        stochasticity: s, at least 0; 0: no random numbers are drawn.
        generator: of the fresh noise, one or one per sample; None: torch's own.

    Raises:
        UserError: if there are no steps, or more steps than timesteps, or s is negative or not finite.
    """
    check_stochasticity(stochasticity)
    if isinstance(generator, list) and len(generator) != len(noise):
        raise UserError(f"generator: expected one, or a list of {len(noise)}, one per sample; got {len(generator)}")
    grid = student.schedule.grid(steps) if isinstance(steps, int) else steps
    times = grid.to(noise.device)
    # N(0, I) in the teacher's variables; here at t_max its scale is another one.
    x = student.parametrization.prior(noise)
    with student.equal_jumps():
        for (t, r), (start, end) in zip(pairwise(times), pairwise(grid.tolist()), strict=True):
            if not stochasticity:
                x = student(x, t.expand(len(x)), r.expand(len(x)), cond)
                continue
            target, factor, spread = _noisy_step(start, end, stochasticity)
            ends = torch.full((len(x),), target, dtype=torch.float64, device=x.device)
            x = factor * student(x, t.expand(len(x)), ends, cond)
            if spread:
                x = x + spread * randn_tensor(x.shape, generator=generator, device=x.device, dtype=x.dtype)
    return x


def check_stochasticity(value: float) -> None:
    """Check the strength of the fresh noise.

    Raises:
        UserError: if it is negative or not finite.
    """
    if not 0 <= value < math.inf:
        raise UserError(f"stochasticity: expected a finite number of at least 0, got {value:g}; try 0.5")


def _noisy_step(t: float, r: float, stochasticity: float) -> tuple[float, float, float]:
    """Return the time that a step from t to r jumps to, the factor of the sample there, and that of the fresh noise.

    At the time ``r m / c`` with ``c = 1 - r + r m``, a sample is ``((1 - r) x_0 + r m eps) / c``. Multiplied by c, and
    with independent noise of deviation ``r sqrt(1 - m^2)``, it has the signal and the noise of the time r.
    """
    # The quotient of sigma / alpha at both ends. Its logarithms add up over the steps, and so do those of m: several
    # steps preserve as much of the noise as one does.
    # A start of the caller may exceed 1 by a rounding of float32.
    ratio = r * max(1 - t, 0.0) / (t * (1 - r))
    # A product, as a power of a large float is an error instead of infinity.
    m = ratio ** (stochasticity * stochasticity)
    factor = 1 - r + r * m
    return r * m / factor, factor, r * math.sqrt((1 - m) * (1 + m))
