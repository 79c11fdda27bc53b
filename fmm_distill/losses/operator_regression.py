"""Operator regression: the jump is regressed on the teacher's solved trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill.core.solvers import solve
from fmm_distill.losses.base import Jump, Loss, squared_norm
from fmm_distill.losses.time_sampling import TimeSampling

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["OperatorRegression"]


class OperatorRegression(Loss):
    """``|X(x_t, t, r) - x_r|^2`` with x_r solved from x_t, mean over the event.

    Zheng et al. (arXiv 2211.13449) take t at the noise (``time_sampling.prior: 1``). The target has the solver's error,
    of fourth order in its step.
    """

    summary: ClassVar[str] = "regression of jumps from noise on the teacher's solved trajectories (neural operator)"
    paper: ClassVar[str] = "arXiv 2211.13449; as a special case arXiv 2406.07507"
    needed_sampling: ClassVar[TimeSampling | None] = TimeSampling(prior=1)

    name: Literal["operator_regression"] = "operator_regression"
    """Name of the loss."""
    velocity: Literal["teacher"] = "teacher"
    """Velocity of the trajectories."""
    solver_steps: int = Field(default=8, ge=1, le=10_000)
    """RK4 steps from t to r; four calls of the teacher each."""

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        t, r = jump.t, jump.r
        with torch.no_grad():
            # Per sample: each has its own (t, r), and all take the same number of steps.
            fractions = torch.linspace(0, 1, self.solver_steps + 1, dtype=t.dtype, device=t.device)
            x_r = solve(velocity, jump.x, t - fractions[:, None] * (t - r), cond=jump.cond)
        return squared_norm(flow_map(jump.x, t, r, jump.cond) - x_r)
