"""Progressive: one jump equals several shorter ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import LossSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ProgressiveSettings", "progressive"]


class ProgressiveSettings(LossSettings):
    """Settings of the progressive loss."""

    summary: ClassVar[str] = "one jump equals several shorter ones of a map, or of the teacher's solver (PFMM, PSD)"
    paper: ClassVar[str] = "arXiv 2406.07507; PSD arXiv 2505.18825"
    takes: ClassVar[frozenset[str]] = frozenset({"target_map", "share"})

    name: Literal["progressive"] = "progressive"
    """Which loss this is."""
    velocity: Literal["teacher"] = "teacher"
    """Whose velocity the solver's steps take (target: ode)."""
    target: Literal["student", "average", "frozen", "ode"] = "student"
    """Whose shorter jumps: the student's (PSD; add flow_matching), its average's, a frozen copy's, or the teacher's."""
    pieces: int = Field(default=2, ge=2, le=1000)
    """How many shorter jumps."""
    middle: Literal["half", "uniform"] = "half"
    """Where two pieces meet: half-way, or anywhere with equal chance."""
    solver: Literal["euler", "heun"] = "heun"
    """The teacher's solver; acts on target: ode only."""

    @property
    def sees_no_teacher(self) -> bool:
        """With its own jumps or its average's; a frozen copy starts as the teacher."""
        return self.target in ("student", "average")

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        if self.middle == "uniform" and self.pieces != 2:
            raise ValueError(f"middle: uniform places the one time between 2 pieces, not {self.pieces}")
        if self.target != "ode" and self.solver != "heun":
            raise ValueError("solver acts on target: ode only")
        return self


def progressive(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: ProgressiveSettings,
    target_map: FlowMap | None = None,
    share: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """``|u(x_t, t, r) - sg(sum of w_i u_i)|^2``, mean over the event, one number a sample.

    u_i are the mean velocities of successive jumps from t to r, w_i their shares of its length: on u, so no factor
    ``(t - r)^2`` kills the gradient near the diagonal (the preconditioned PSD of arXiv 2505.18825;
    progressive flow map matching of arXiv 2406.07507 with a frozen ``target_map``). ``share`` places the middle
    time when ``middle="uniform"``. The target is stopped; without ``target_map`` it is the map's own.
    """
    source = flow_map if target_map is None else target_map
    if settings.middle == "uniform":
        ends = torch.stack([torch.ones_like(share), share, torch.zeros_like(share)])
    else:
        ends = torch.linspace(1, 0, settings.pieces + 1, dtype=t.dtype, device=t.device)[:, None].expand(-1, len(t))
    with torch.no_grad():
        x, target = x_t, torch.zeros_like(x_t)
        for a, b in pairwise(ends):
            start, end = r + a * (t - r), r + b * (t - r)
            if settings.target == "ode":
                u = velocity(x, start, cond)
                if settings.solver == "heun":
                    u = (u + velocity(x - expand(start - end, x) * u, end, cond)) / 2
            else:
                u = source.mean_velocity(x, start, end, cond)
            target = target + expand(a - b, x) * u
            x = x - expand(start - end, x) * u
    return squared_norm(flow_map.mean_velocity(x_t, t, r, cond) - target)
