"""The Lagrangian loss: the end of a jump moves with the velocity there."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.core.derivatives.engines import value_and_derivative_in_r
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeLoss, Jump, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Lagrangian"]


class Lagrangian(DerivativeLoss):
    """``|d_r X(x_t, t, r) - v(X(x_t, t, r), r)|^2``, mean over the event.

    With ``X = x - (t - r) u`` the residual is ``u - (t - r) d_r u - v(X, r)``. It vanishes for every (t, r) at
    the flow map of v, and only there (Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507, Lagrangian map
    distillation; its s and t are our 1 - t and 1 - r).

    - ``stop_gradient="nowhere"``: the published loss, with the gradient through the teacher's input too.
    - ``stop_gradient="teacher_input"``: v is evaluated at the detached X, without a graph; the gradient passes through
      u and d_r u. With ``velocity="self"`` there is no teacher: v is the student's own diagonal, and neither its input
      nor its weights get a gradient from it (the stop-gradient rule of LSD, arXiv 2505.18825).
    - ``stop_gradient="target"``: u is regressed on ``v(X, r) + (t - r) d_r u``, all of it detached (as AYF-LMD,
      arXiv 2506.14603), without a graph of the derivative.
    """

    summary: ClassVar[str] = "the end of a jump moves with the velocity there (LMD; with velocity: self, LSD)"
    paper: ClassVar[str] = "arXiv 2406.07507; LSD arXiv 2505.18825"
    in_r: ClassVar[bool] = True

    name: Literal["lagrangian"] = "lagrangian"
    """Name of the loss."""
    velocity: Literal["teacher", "self"] = "teacher"
    """Velocity that the end follows: the teacher's, or the student's own diagonal (add flow_matching then)."""
    stop_gradient: Literal["teacher_input", "nowhere", "target"] = "teacher_input"
    """Part without a gradient: v and its input, nothing (as published), or the complete regression target."""

    @property
    def keeps_graph(self) -> bool:
        """Return whether the target is not detached."""
        return self.stop_gradient != "target"

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        x_t, t, r, cond = jump.x, jump.t, jump.r, jump.cond
        length = expand(t - r, x_t)
        if self.stop_gradient == "target":
            u, du_dr = value_and_derivative_in_r(flow_map, x_t, t, r, cond=cond, engine=self.engine, detached=True)
            with torch.no_grad():
                # Under no_grad as a block: u has a graph, which the target must not have.
                target = velocity(x_t - length * u, r, cond) + length * du_dr
            return squared_norm(u - target)
        u, du_dr = value_and_derivative_in_r(flow_map, x_t, t, r, cond=cond, engine=self.engine)
        end = x_t - length * u
        if self.stop_gradient == "nowhere":
            # With a graph through the teacher: its backward pass is part of each step.
            v = velocity(end, r, cond)
        else:
            with torch.no_grad():
                v = velocity(end.detach(), r, cond)
        return squared_norm(u - length * du_dr - v)
