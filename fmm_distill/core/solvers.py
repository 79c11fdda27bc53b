"""Fixed-step solvers along a velocity field, from noise to data, and the teacher's converged endpoint."""

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
    """The solution of ``dx/dt = v(x, t)`` at ``times[-1]``, started from x at ``times[0]``.

    ``times`` holds one time for all samples in a row, or a row of one time a sample. Orders
    1, 2 and 4; 1, 2 and 4 calls a step.
    """

    def at(position: Tensor, time: Tensor) -> Tensor:
        return velocity(position, time.expand(len(position)), cond)

    for t, r in pairwise(times):
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
    """Where the teacher's ODE takes x from t_max: RK4 with equal shares of the way down to t_min, then x0_hat.

    The last stretch, from t_min to data, is one Euler step, as in the stock DDIM sampler.
    """
    shares = torch.linspace(1, 0, steps + 1, dtype=torch.float64, device=x.device)
    x = solve(velocity, x, schedule.time_at(shares), cond=cond)
    last = torch.full((len(x),), schedule.t_min, dtype=torch.float64, device=x.device)
    return x - expand(last, x) * velocity(x, last, cond)
