"""Consistency trajectory: two ways to the same time are compared where they end in data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill.core.solvers import solve
from fmm_distill.losses.base import LossSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ConsistencyTrajectorySettings", "consistency_trajectory"]


class ConsistencyTrajectorySettings(LossSettings):
    """Settings of the consistency trajectory loss."""

    summary: ClassVar[str] = (
        "a jump, and a solver step followed by a jump, reach the same data (CTM's soft matching, without its GAN)"
    )
    paper: ClassVar[str] = "arXiv 2310.02279"
    takes: ClassVar[frozenset[str]] = frozenset({"target_map", "share"})

    name: Literal["consistency_trajectory"] = "consistency_trajectory"
    """Which loss this is."""
    velocity: Literal["teacher"] = "teacher"
    """Whose solver makes the first stretch of the target."""
    target: Literal["student", "average"] = "average"
    """Whose jumps follow it, and take both to data: the student's own, or those of its moving average."""
    solver_steps: int = Field(default=2, ge=1, le=10_000)
    """Heun steps of the first stretch; two calls of the teacher each."""


def consistency_trajectory(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: ConsistencyTrajectorySettings,
    target_map: FlowMap | None = None,
    share: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """``|Y(X(x_t, t, r), r, 0) - Y(Y(x_s, s, r), r, 0)|^2``, mean over the event, one number a sample.

    ``s = r + share (t - r)``, x_s solved from x_t, Y the stopped ``target_map`` (Kim et al., arXiv 2310.02279,
    without the GAN and the denoising term). The gradient passes through Y at r to the jump X, not to Y's weights.
    The solver's error, of second order in its step, is the target's.
    """
    source = flow_map if target_map is None else target_map
    zero = torch.zeros_like(r)
    with torch.no_grad():
        s = r + share * (t - r)
        shares = torch.linspace(0, 1, settings.solver_steps + 1, dtype=t.dtype, device=t.device)
        x_s = solve(velocity, x_t, t - shares[:, None] * (t - s), method="heun", cond=cond)
        wanted = source(source(x_s, s, r, cond), r, zero, cond)
    end = flow_map(x_t, t, r, cond)
    with torch.enable_grad():
        # Y may be the student itself: its gradient is taken at its input alone and handed on to X.
        at = end.detach().requires_grad_()
        loss = squared_norm(source(at, r, zero, cond) - wanted)
        (slope,) = torch.autograd.grad(loss.sum(), at)
    return loss.detach() + ((end - end.detach()) * slope).flatten(1).sum(1)
