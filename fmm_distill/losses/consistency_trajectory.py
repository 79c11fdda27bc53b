"""Consistency trajectory: two ways to the same time are compared where they end in data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill.core.solvers import solve
from fmm_distill.losses.base import Jump, Loss, TargetNetwork, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ConsistencyTrajectory"]


class ConsistencyTrajectory(Loss):
    """``|Y(X(x_t, t, r), r, 0) - Y(Y(x_s, s, r), r, 0)|^2``, mean over the event.

    The middle time is ``s = r + jump.uniform (t - r)``, x_s is solved from x_t, and Y is the stopped ``target_map``
    (Kim et al., arXiv 2310.02279, without the GAN and the denoising term). The gradient passes through Y at r to the
    jump X, not to Y's weights. The target has the solver's error, of second order in its step.
    """

    summary: ClassVar[str] = (
        "a jump, and a solver step followed by a jump, reach the same data (CTM's soft matching, without its GAN)"
    )
    paper: ClassVar[str] = "arXiv 2310.02279"

    name: Literal["consistency_trajectory"] = "consistency_trajectory"
    """Name of the loss."""
    velocity: Literal["teacher"] = "teacher"
    """Velocity that the first stretch of the target solves."""
    target: Literal["student", "average"] = "average"
    """Map that follows the solver and takes both ends to data: the student, or its moving average."""
    solver_steps: int = Field(default=2, ge=1, le=10_000)
    """Heun steps of the first stretch; two calls of the teacher each."""

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return the moving average if it makes the target."""
        return None if self.target == "student" else self.target

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        t, r, cond = jump.t, jump.r, jump.cond
        source = flow_map if jump.target_map is None else jump.target_map
        zero = torch.zeros_like(r)
        with torch.no_grad():
            s = r + jump.uniform * (t - r)
            # Per sample: each has its own s, and all take the same number of steps.
            fractions = torch.linspace(0, 1, self.solver_steps + 1, dtype=t.dtype, device=t.device)
            x_s = solve(velocity, jump.x, t - fractions[:, None] * (t - s), method="heun", cond=cond)
            target = source(source(x_s, s, r, cond), r, zero, cond)
        end = flow_map(jump.x, t, r, cond)
        # ``autograd.grad`` needs a graph even where the loss is only evaluated.
        with torch.enable_grad():
            # Y may be the student itself: its gradient is taken at its input alone and passed on to X.
            at = end.detach().requires_grad_()
            loss = squared_norm(source(at, r, zero, cond) - target)
            (slope,) = torch.autograd.grad(loss.sum(), at)
        # The value of the loss with its gradient through X alone, by the chain rule.
        return loss.detach() + ((end - end.detach()) * slope).flatten(1).sum(1)
