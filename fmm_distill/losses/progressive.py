"""Progressive: one jump equals several shorter ones."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import Jump, Loss, TargetNetwork, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Progressive"]


class Progressive(Loss):
    """``|u(x_t, t, r) - sg(sum of w_i u_i)|^2``, mean over the event.

    u_i are the mean velocities of successive jumps from t to r, w_i their fractions of its length. The residual is
    taken on u, so that no factor ``(t - r)^2`` removes the gradient near the diagonal (the preconditioned PSD of arXiv
    2505.18825; progressive flow map matching of arXiv 2406.07507 with a frozen ``target_map``). ``jump.uniform``
    places the middle time when ``middle="uniform"``. The target is stopped; without ``target_map`` it is the map's own.
    """

    summary: ClassVar[str] = "one jump equals several shorter ones of a map, or of the teacher's solver (PFMM, PSD)"
    paper: ClassVar[str] = "arXiv 2406.07507; PSD arXiv 2505.18825"

    name: Literal["progressive"] = "progressive"
    """Name of the loss."""
    velocity: Literal["teacher"] = "teacher"
    """Velocity of the solver's steps (target: ode)."""
    target: Literal["student", "average", "frozen", "ode"] = "student"
    """Shorter jumps of the student (PSD; add flow_matching), its average, a frozen copy, or the teacher's solver."""
    pieces: int = Field(default=2, ge=2, le=1000)
    """Number of shorter jumps."""
    middle: Literal["half", "uniform"] = "half"
    """Time at which two pieces meet: half-way, or anywhere with equal chance."""
    solver: Literal["euler", "heun"] = "heun"
    """The teacher's solver; acts on target: ode only."""

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return the copy that makes the shorter jumps."""
        return self.target if self.target in ("average", "frozen") else None

    @property
    def needs_velocity_term(self) -> bool:
        """Return whether the target is the student or its average; a frozen copy starts as the teacher."""
        return self.target in ("student", "average")

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        if self.middle == "uniform" and self.pieces != 2:
            raise ValueError(f"middle: uniform places the one time between 2 pieces, not {self.pieces}")
        if self.target != "ode" and self.solver != "heun":
            raise ValueError("solver acts on target: ode only")
        return self

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        t, r, cond = jump.t, jump.r, jump.cond
        source = flow_map if jump.target_map is None else jump.target_map
        if self.middle == "uniform":
            # Fractions of the jump, from its start (1) to its end (0).
            ends = torch.stack([torch.ones_like(jump.uniform), jump.uniform, torch.zeros_like(jump.uniform)])
        else:
            ends = torch.linspace(1, 0, self.pieces + 1, dtype=t.dtype, device=t.device)[:, None].expand(-1, len(t))
        with torch.no_grad():
            x, target = jump.x, torch.zeros_like(jump.x)
            for a, b in pairwise(ends):
                start, end = r + a * (t - r), r + b * (t - r)
                if self.target == "ode":
                    u = velocity(x, start, cond)
                    if self.solver == "heun":
                        u = (u + velocity(x - expand(start - end, x) * u, end, cond)) / 2
                else:
                    u = source.mean_velocity(x, start, end, cond)
                # Weighted by fractions of the jump, so that the mean velocity needs no quotient by t - r.
                target = target + expand(a - b, x) * u
                # The x after the last piece is not used; one update costs less than a branch.
                x = x - expand(start - end, x) * u
        return squared_norm(flow_map.mean_velocity(jump.x, t, r, cond) - target)
