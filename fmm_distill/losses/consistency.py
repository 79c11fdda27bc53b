"""Consistency: jumps that start a step apart on one trajectory end in the same place."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.losses.base import Jump, TargetNetwork, squared_norm
from fmm_distill.losses.eulerian import Eulerian, TangentLoss, change_over_step
from fmm_distill.losses.time_sampling import TimeSampling

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Consistency"]


class Consistency(TangentLoss):
    """``|u - sg(u - g)|^2``, ``g = (X(x_s, s, r) - X(x_t, t, r)) / (t - s)``, mean over the event.

    s is ``t - step`` (r at the latest) and x_s one solver step away. Consistency models take r = 0
    (``time_sampling.data: 1``). The gradient of the published ``|X(x_t, t, r) - sg X(x_s, s, r)|^2`` is this one's
    times ``(t - s)(t - r)`` (Song et al., arXiv 2303.01469), a weight that vanishes near the diagonal and with the
    step. As the step goes to 0, at first order, g is the Eulerian residual; ``step=0`` is ``Eulerian`` with
    ``stop_gradient="target"`` (with ``normalize_tangent`` sCM, arXiv 2410.11081, on our axis instead of its
    trigonometric one).
    """

    summary: ClassVar[str] = (
        "two starts on one trajectory, a step apart, reach the same data; step: 0 is its continuous limit"
    )
    paper: ClassVar[str] = "arXiv 2303.01469; continuous arXiv 2410.11081"
    # Consistency models are trained on jumps to data alone.
    needed_sampling: ClassVar[TimeSampling | None] = TimeSampling(prior=0, data=1)
    without_data: ClassVar[str] = "set its velocity: teacher"

    name: Literal["consistency"] = "consistency"
    """Name of the loss."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Velocity of the step: the teacher's (distillation), or the sample's own (training)."""
    step: float = Field(default=0.0, ge=0, lt=1)
    """Distance in time between the two starts; 0 takes the derivative instead."""
    solver: Literal["euler", "heun"] = "euler"
    """Solver of the teacher's step; the sample's own velocity is constant, so euler is exact there."""
    target: Literal["student", "average"] = "student"
    """Map whose jump is the target of a finite step: the student, or its moving average."""

    @property
    def differentiates(self) -> bool:
        """Return whether there is no finite step in place of the derivative."""
        return self.step == 0

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return the moving average if it makes the target."""
        return None if self.target == "student" else self.target

    @model_validator(mode="after")
    def _acts_on_a_step(self) -> Self:
        if self.step == 0 and (self.solver, self.target) != ("euler", "student"):
            raise ValueError("solver and target act on a finite step only; set loss.step")
        if self.step and (self.derivative != "auto" or self.tangent_scale != 1 or self.tangent_warmup_steps):
            raise ValueError("derivative, tangent_scale and tangent_warmup_steps act on step: 0 only")
        if self.velocity == "data" and self.solver == "heun":
            raise ValueError("the sample's own velocity is constant: solver: heun does nothing")
        return self

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        if not self.step:
            return Eulerian.detached_like(self)(flow_map, velocity, jump)
        # Regressed on u instead of X: the weight of the published form vanishes near the diagonal.
        u = flow_map.mean_velocity(jump.x, jump.t, jump.r, jump.cond)
        with torch.no_grad():
            s, v = torch.maximum(jump.t - self.step, jump.r), velocity(jump.x, jump.t, jump.cond)
            source = flow_map if jump.target_map is None else jump.target_map
            change = change_over_step(source, velocity, jump, s, u, v, self.solver)
            # A target of the form u - g has the gradient of g alone, so that g can be clamped and normalized.
            target = u - self.stabilize(u - v + change)
        return squared_norm(u - target)
