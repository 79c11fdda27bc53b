"""The Eulerian loss: the map's end stays where it is while its start moves with the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.derivatives import derivative_along_flow, value_and_derivative_along_flow
from fmm_distill.interpolant import expand
from fmm_distill.losses.base import LossSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.flow_map import FlowMap
    from fmm_distill.velocity import Conditioning, VelocityField

__all__ = ["EulerianSettings", "eulerian"]


class EulerianSettings(LossSettings):
    """Settings of the Eulerian loss."""

    name: Literal["eulerian"] = "eulerian"
    """Which loss this is."""
    stop: Literal["none", "target"] = "target"
    """Where gradients stop: nowhere in the student, or at a detached regression target."""
    normalise_tangent: bool = False
    """Divide the target's step by its norm plus 0.1 (per sample); needs stop: target."""
    tangent_warmup_steps: int = Field(default=0, ge=0)
    """Steps over which the derivative's share of the target grows from 0 to 1; needs stop: target."""
    tangent_scale: float = Field(default=1.0, ge=0, le=1)
    """The derivative's share of the target once warmed up; needs stop: target where it is not 1."""

    @model_validator(mode="after")
    def _acts_on_target(self) -> Self:
        if self.stop == "none" and (self.normalise_tangent or self.tangent_warmup_steps or self.tangent_scale != 1):
            raise ValueError("normalise_tangent, tangent_warmup_steps and tangent_scale act on stop: target only")
        return self

    def at_step(self, step: int) -> Self:
        """The tangent's share after ``step`` steps of its warm-up."""
        if step >= self.tangent_warmup_steps:
            return self
        return self.model_copy(update={"tangent_scale": self.tangent_scale * step / self.tangent_warmup_steps})


def eulerian(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: EulerianSettings,
) -> Float[Tensor, " batch"]:
    """``|d_t X(x_t, t, r) + grad X . v(x_t, t)|^2``, mean over the event, one number a sample.

    With ``X = x - (t - r) u`` the residual is, up to its sign, ``u - v + (t - r)(d_t u + grad u . v)``. It vanishes
    for every (t, r) at the flow map of v (Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507, Eulerian map
    distillation). The teacher sees only ``x_t``.

    - ``stop="none"``: the published loss, gradient through the derivative.
    - ``stop="target"``: u is regressed on a detached ``u - g``, g the residual (AYF-EMD, arXiv 2506.14603;
      MeanFlow, arXiv 2505.13447, eq. 9 to 11, with the teacher's velocity). ``normalise_tangent`` takes
      ``g / (|g| + 0.1)`` with the norm over the event (sCM, arXiv 2410.11081, section 4).
    """
    engine = "exact" if settings.derivative == "auto" else settings.derivative
    length = expand(t - r, x_t)
    with torch.no_grad():
        v = velocity(x_t, t, cond)
    if settings.stop == "none":
        u, du = value_and_derivative_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=engine)
        return squared_norm(u - v + length * du)
    with torch.no_grad():
        du = derivative_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=engine)
    u = flow_map.mean_velocity(x_t, t, r, cond)
    with torch.no_grad():
        g = u - v + settings.tangent_scale * length * du
        if settings.normalise_tangent:
            g = g / expand(g.flatten(1).norm(dim=1) + 0.1, g)
        target = u - g
    return squared_norm(u - target)
