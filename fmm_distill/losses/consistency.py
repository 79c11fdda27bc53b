"""Consistency: jumps that start a step apart on one trajectory end in the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.losses.base import squared_norm
from fmm_distill.losses.eulerian import EulerianSettings, TangentSettings, change_over_step, eulerian, steadied

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ConsistencySettings", "consistency"]


class ConsistencySettings(TangentSettings):
    """Settings of the consistency loss."""

    summary: ClassVar[str] = (
        "two starts on one trajectory, a step apart, reach the same data; step: 0 is its continuous limit"
    )
    paper: ClassVar[str] = "arXiv 2303.01469; continuous arXiv 2410.11081"
    takes: ClassVar[frozenset[str]] = frozenset({"target_map"})

    name: Literal["consistency"] = "consistency"
    """Which loss this is."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Whose velocity makes the step: the teacher's (distillation), or the sample's own (training)."""
    step: float = Field(default=0.0, ge=0, lt=1)
    """How far apart in time the two starts are; 0 takes the derivative instead."""
    solver: Literal["euler", "heun"] = "euler"
    """How the teacher makes the step; the sample's own velocity is constant, so euler is exact there."""
    target: Literal["student", "average"] = "student"
    """Whose jump is the target of a finite step: the student's own, or that of its moving average."""

    @property
    def differentiates(self) -> bool:
        """Without a finite step."""
        return self.step == 0

    @model_validator(mode="after")
    def _acts_on_a_step(self) -> Self:
        if self.step == 0 and (self.solver, self.target) != ("euler", "student"):
            raise ValueError("solver and target act on a finite step only; set loss.step")
        if self.step and (self.derivative != "auto" or self.tangent_scale != 1 or self.tangent_warmup_steps):
            raise ValueError("derivative, tangent_scale and tangent_warmup_steps act on step: 0 only")
        if self.velocity == "data" and self.solver == "heun":
            raise ValueError("the sample's own velocity is constant: solver: heun does nothing")
        return self


def consistency(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: ConsistencySettings,
    target_map: FlowMap | None = None,
) -> Float[Tensor, " batch"]:
    """``|u - sg(u - g)|^2``, ``g = (X(x_s, s, r) - X(x_t, t, r)) / (t - s)``, mean over the event, one a sample.

    s is ``t - step`` (r at the latest) and x_s one solver step away. Consistency models take r = 0 (``pairs.data: 1``).
    The gradient of the published ``|X(x_t, t, r) - sg X(x_s, s, r)|^2`` is this one's times ``(t - s)(t - r)`` (Song
    et al., arXiv 2303.01469), a weight that vanishes near the diagonal and with the step. As the step
    goes to 0, at first order, g is the Eulerian residual; ``step=0`` is ``eulerian`` with ``stop="target"`` (with
    ``normalize_tangent`` sCM, arXiv 2410.11081, on our axis instead of its trigonometric one).
    """
    if not settings.step:
        shared = settings.model_dump(include=set(TangentSettings.model_fields))
        return eulerian(
            flow_map,
            velocity,
            x_t,
            t,
            r,
            cond=cond,
            settings=EulerianSettings.model_validate(shared | {"stop": "target"}),
        )
    u = flow_map.mean_velocity(x_t, t, r, cond)
    with torch.no_grad():
        s, v = torch.maximum(t - settings.step, r), velocity(x_t, t, cond)
        source = flow_map if target_map is None else target_map
        change = change_over_step(source, velocity, x_t, t, s, r, u, v, cond=cond, solver=settings.solver)
        target = u - steadied(u - v + change, settings)
    return squared_norm(u - target)
