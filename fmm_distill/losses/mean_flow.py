"""Mean flow: the Eulerian loss with the interpolant's velocity, and its improved form."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import model_validator

from fmm_distill.core.derivatives.engines import value_and_derivative_along_flow
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import Jump, squared_norm
from fmm_distill.losses.eulerian import Eulerian, TangentLoss

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["MeanFlow"]


class MeanFlow(TangentLoss):
    """``|u - sg(v - (t - r) du/dt)|^2`` with ``v = eps - x_0``, mean over the event.

    Without ``improved`` it is ``Eulerian`` with ``stop_gradient="target"`` (Geng et al., arXiv 2505.13447, eq. 9 to
    11). With it, the residual is ``u + (t - r) sg(du/dt) - v`` with du/dt along the predicted ``u(x_t, t, t)``, so that
    the regression target is free of the network and its minimizer a conditional mean (arXiv 2512.02012).
    """

    summary: ClassVar[str] = (
        "the detached Eulerian loss from data alone; improved: with the student's own velocity as tangent"
    )
    paper: ClassVar[str] = "arXiv 2505.13447; improved arXiv 2512.02012"
    without_data: ClassVar[str] = "take eulerian with stop_gradient: target"

    name: Literal["mean_flow"] = "mean_flow"
    """Name of the loss."""
    velocity: Literal["data"] = "data"
    """Velocity of the regression; with a teacher's this is eulerian with stop_gradient: target."""
    improved: bool = False
    """Differentiate along the student's own diagonal instead of along the sample's velocity."""

    @model_validator(mode="after")
    def _regresses_on_velocity(self) -> Self:
        if self.improved and (self.normalize_tangent or self.clamp_tangent is not None):
            raise ValueError(
                "improved regresses on the velocity itself: normalize_tangent and clamp_tangent do nothing"
            )
        return self

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        if not self.improved:
            return Eulerian.detached_like(self)(flow_map, velocity, jump)
        x_t, t, r, cond = jump.x, jump.t, jump.r, jump.cond
        with torch.no_grad():
            # A call of its own, on the diagonal: it is only the direction of the derivative.
            tangent = flow_map.mean_velocity(x_t, t, t, cond)
        u, du = value_and_derivative_along_flow(
            flow_map, x_t, t, r, tangent, cond=cond, engine=self.engine, detached=True
        )
        with torch.no_grad():
            target = velocity(x_t, t, cond) - self.tangent_scale * expand(t - r, x_t) * du
        return squared_norm(u - target)
