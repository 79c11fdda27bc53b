"""Mean flow: the Eulerian loss with the interpolant's velocity, and its improved form."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from fmm_distill.core.derivatives.engines import value_and_derivative_along_flow
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import squared_norm
from fmm_distill.losses.eulerian import EulerianSettings, TangentSettings, eulerian

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["MeanFlowSettings", "mean_flow"]


class MeanFlowSettings(TangentSettings):
    """Settings of mean flow."""

    summary: ClassVar[str] = (
        "the detached Eulerian loss from data alone; improved: with the student's own velocity as tangent"
    )
    paper: ClassVar[str] = "arXiv 2505.13447; improved arXiv 2512.02012"

    name: Literal["mean_flow"] = "mean_flow"
    """Which loss this is."""
    velocity: Literal["data"] = "data"
    """Whose velocity is regressed on; with a teacher's this is eulerian with stop: target."""
    improved: bool = False
    """Differentiate along the student's own diagonal instead of along the sample's velocity."""

    @model_validator(mode="after")
    def _regresses_on_velocity(self) -> Self:
        if self.improved and (self.normalize_tangent or self.clamp_tangent is not None):
            raise ValueError(
                "improved regresses on the velocity itself: normalize_tangent and clamp_tangent do nothing"
            )
        return self


def mean_flow(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: MeanFlowSettings,
) -> Float[Tensor, " batch"]:
    """``|u - sg(v - (t - r) du/dt)|^2`` with ``v = eps - x_0``, mean over the event, one number a sample.

    Plain, it is ``eulerian`` with ``stop="target"`` (Geng et al., arXiv 2505.13447, eq. 9 to 11). Improved, the
    residual is ``u + (t - r) sg(du/dt) - v`` with du/dt along the predicted ``u(x_t, t, t)``, so that the regression
    target is free of the network and its minimizer a conditional mean (arXiv 2512.02012).
    """
    if not settings.improved:
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
    engine = "exact" if settings.derivative == "auto" else settings.derivative
    with torch.no_grad():
        predicted = flow_map.mean_velocity(x_t, t, t, cond)
    u, du = value_and_derivative_along_flow(flow_map, x_t, t, r, predicted, cond=cond, engine=engine, detached=True)
    with torch.no_grad():
        target = velocity(x_t, t, cond) - settings.tangent_scale * expand(t - r, x_t) * du
    return squared_norm(u - target)
