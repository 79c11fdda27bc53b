"""Fixed-step solvers of a velocity field's ODE, and the converged endpoint of a trajectory."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import torch

from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Method", "endpoint", "solve"]

Method = Literal["euler", "heun", "rk4"]


def solve(
    velocity: VelocityField,
    x: Float[Tensor, "batch *event"],
    times: Float[Tensor, "points *batch"],
    *,
    method: Method = "rk4",
    cond: Conditioning | None = None,
) -> Float[Tensor, "batch *event"]:
    """Return the solution of ``dx/dt = v(x, t)`` at ``times[-1]``, shape ``[batch, *event]``.

    Args:
        x: the start, at ``times[0]``.
        times: grid points, shape ``[points]`` for all samples or ``[points, batch]`` for each its own.
        method: ``euler``, ``heun`` (Heun's method) or ``rk4`` (the classical Runge-Kutta method), of order 1, 2 and 4
            with as many velocity calls per step.
    """

    def at(x: Tensor, time: Tensor) -> Tensor:
        # A scalar time and one of shape ``[batch]`` both expand to ``[batch]``.
        return velocity(x, time.expand(len(x)), cond)

    for t, r in pairwise(times):
        # The difference of the times in float64, before the cast to the dtype of x.
        step = expand(r - t, x)
        k1 = at(x, t)
        if method == "euler":
            x = x + step * k1
        elif method == "heun":
            x = x + step / 2 * (k1 + at(x + step * k1, r))
        else:
            middle = (t + r) / 2
            k2 = at(x + step / 2 * k1, middle)
            k3 = at(x + step / 2 * k2, middle)
            k4 = at(x + step * k3, r)
            x = x + step / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return x


def endpoint(
    velocity: VelocityField,
    schedule: TimeAxis,
    x: Float[Tensor, "batch *event"],
    steps: int,
    cond: Conditioning | None = None,
) -> Float[Tensor, "batch *event"]:
    """Return the data that the ODE leads to from x at t_max: RK4 down to t_min, then one Euler step to ``x0_hat``.

    Args:
        steps: of RK4, of equal size in the teacher's own count.
    """
    # Equal steps of the teacher's own count, since t itself is crowded near data for some schedules.
    progress = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    x = solve(velocity, x, schedule.time_at(progress), cond=cond)
    # The teacher is not trained below t_min: the stock DDIM sampler makes the same last step.
    last = torch.full((len(x),), schedule.t_min, dtype=torch.float64, device=x.device)
    return x - expand(last, x) * velocity(x, last, cond)
