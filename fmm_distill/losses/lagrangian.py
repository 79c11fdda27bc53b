"""The Lagrangian loss: the map's end moves with the teacher's velocity there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.core.derivatives.engines import value_and_derivative_in_r
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["LagrangianSettings", "lagrangian"]


class LagrangianSettings(DerivativeSettings):
    """Settings of the Lagrangian loss."""

    summary: ClassVar[str] = "the end of a jump moves with the velocity there (LMD; with velocity: self, LSD)"
    paper: ClassVar[str] = "arXiv 2406.07507; LSD arXiv 2505.18825"
    in_r: ClassVar[bool] = True

    name: Literal["lagrangian"] = "lagrangian"
    """Which loss this is."""
    velocity: Literal["teacher", "self"] = "teacher"
    """Whose velocity the end follows: the teacher's, or the student's own diagonal (add flow_matching then)."""
    stop: Literal["teacher", "none", "target"] = "teacher"
    """Where gradients stop: at the teacher's input, nowhere (as published), or at a detached regression target."""

    @property
    def sees_no_teacher(self) -> bool:
        """With the student's own velocity."""
        return self.velocity == "self"

    @property
    def keeps_graph(self) -> bool:
        """Where the target is not detached."""
        return self.stop != "target"


def lagrangian(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: LagrangianSettings,
) -> Float[Tensor, " batch"]:
    """``|d_r X(x_t, t, r) - v(X(x_t, t, r), r)|^2``, mean over the event, one number a sample.

    With ``X = x - (t - r) u`` the residual is ``u - (t - r) d_r u - v(X, r)``. It vanishes for every (t, r) at
    the flow map of v, and only there (Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507, Lagrangian map
    distillation; its s and t are our 1 - t and 1 - r).

    - ``stop="none"``: the published loss, gradient through the teacher's input too.
    - ``stop="teacher"``: v is taken at the detached X; the gradient passes through d_r u (the stop-gradient rule
      of LSD, arXiv 2505.18825).
    - ``stop="target"``: u is regressed on ``v(X, r) + (t - r) d_r u``, all of it detached (as AYF-LMD,
      arXiv 2506.14603): no graph of the derivative.
    """
    engine = "exact" if settings.derivative == "auto" else settings.derivative
    length = expand(t - r, x_t)
    if settings.stop == "target":
        u, du_dr = value_and_derivative_in_r(flow_map, x_t, t, r, cond=cond, engine=engine, detached=True)
        with torch.no_grad():
            target = velocity(x_t - length * u, r, cond) + length * du_dr
        return squared_norm(u - target)
    u, du_dr = value_and_derivative_in_r(flow_map, x_t, t, r, cond=cond, engine=engine)
    end = x_t - length * u
    if settings.stop == "none":
        v = velocity(end, r, cond)
    else:
        with torch.no_grad():
            v = velocity(end.detach(), r, cond)
    return squared_norm(u - length * du_dr - v)
