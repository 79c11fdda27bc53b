"""The Eulerian loss: the end of a jump does not move while its start moves with the velocity."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.core.derivatives.engines import value_and_derivative_along_flow, value_and_parts_along_flow
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeLoss, Jump, Loss, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Eulerian", "TangentLoss", "change_over_step"]

# sCM (arXiv 2410.11081, section 4) adds it to the norm, so that a small tangent is not scaled up to length 1.
NORM_OFFSET = 0.1


class TangentLoss(DerivativeLoss):
    """A loss with a detached Eulerian target, and the settings that stabilize it."""

    normalize_tangent: bool = False
    """Divide the target's step by its norm plus 0.1 (per sample); needs a detached target."""
    tangent_warmup_steps: int = Field(default=0, ge=0, le=40_000_000)
    """Steps over which the factor of the derivative in the target grows from 0 to 1; needs a detached target."""
    tangent_scale: float = Field(default=1.0, ge=0, le=1)
    """Factor of the derivative in the target after the warm-up; needs a detached target unless it is 1."""
    clamp_tangent: float | None = Field(default=None, gt=0, le=1e9)
    """Largest step of the target in any one value, before the normalization; needs a detached target."""

    @property
    def keeps_graph(self) -> bool:
        """Return whether gradients pass through the derivative; not through a detached target."""
        return False

    def at_step(self, step: int) -> Self:
        """Return the loss with the tangent scale after ``step`` steps of the warm-up."""
        if step >= self.tangent_warmup_steps:
            return self
        # A copy without validation: the settings are frozen, and a step must not cost a validation.
        return self.model_copy(update={"tangent_scale": self.tangent_scale * step / self.tangent_warmup_steps})

    def progress(self, step: int) -> dict[str, float]:
        """Return the tangent scale while it is warmed up."""
        current = self.at_step(step)
        return {} if current == self else {"tangent_scale": current.tangent_scale}

    def stabilize(self, g: Float[Tensor, "batch *event"]) -> Float[Tensor, "batch *event"]:
        """Return the step of a detached target, clamped and normalized."""
        if self.clamp_tangent is not None:
            # Before the normalization: one outlier would otherwise set the norm of its sample.
            g = g.clamp(-self.clamp_tangent, self.clamp_tangent)
        if self.normalize_tangent:
            g = g / expand(g.flatten(1).norm(dim=1) + NORM_OFFSET, g)
        return g


class Eulerian(TangentLoss):
    """``|d_t X(x_t, t, r) + grad X . v(x_t, t)|^2``, mean over the event.

    With ``X = x - (t - r) u`` the residual is, up to its sign, ``u - v + (t - r)(d_t u + grad u . v)``. It vanishes
    for every (t, r) at the flow map of v (Boffi, Albergo, Vanden-Eijnden, arXiv 2406.07507, Eulerian map
    distillation). The teacher is evaluated at ``x_t`` only.

    - ``stop_gradient="nowhere"``: the published loss, with the gradient through the derivative.
    - ``stop_gradient="teacher_input"``: the gradient passes through ``d_t X`` but not through ``grad X . v`` (the rule
      of ESD, arXiv 2505.18825, eq. 94).
    - ``stop_gradient="target"``: u is regressed on a detached ``u - g``, g the residual (AYF-EMD, arXiv 2506.14603;
      MeanFlow, arXiv 2505.13447, eq. 9 to 11, with the teacher's velocity). ``normalize_tangent`` takes
      ``g / (|g| + 0.1)`` with the norm over the event (sCM, arXiv 2410.11081, section 4). With a ``step`` the
      derivative in g is replaced by ``change_over_step``, which averages the network's roughness in time over the step.
    """

    summary: ClassVar[str] = (
        "a jump ends in the same place wherever on a trajectory it starts (EMD; velocity: self, ESD)"
    )
    paper: ClassVar[str] = "arXiv 2406.07507; ESD arXiv 2505.18825; detached arXiv 2506.14603"

    name: Literal["eulerian"] = "eulerian"
    """Name of the loss."""
    velocity: Literal["teacher", "self"] = "teacher"
    """Velocity that the start follows: the teacher's, or the student's own diagonal (add flow_matching then)."""
    stop_gradient: Literal["nowhere", "teacher_input", "target"] = "target"
    """Gradients stop nowhere in the student, at the term with the velocity, or at a detached target."""
    step: float = Field(default=0.0, ge=0, lt=1)
    """Fraction of the teacher's timesteps over which the change along the flow is taken; 0: its derivative."""
    solver: Literal["euler", "heun"] = "heun"
    """Solver of the step along the velocity; acts on a step above 0 only."""

    @property
    def differentiates(self) -> bool:
        """Return whether there is no finite step in place of the derivative."""
        return self.step == 0

    @property
    def keeps_graph(self) -> bool:
        """Return whether the target is not detached."""
        return self.stop_gradient != "target"

    @model_validator(mode="after")
    def _acts_on_a_step(self) -> Self:
        if self.step == 0 and self.solver != "heun":
            raise ValueError("solver acts on a finite step only; set loss.step")
        if self.step and (self.stop_gradient != "target" or self.derivative != "auto"):
            raise ValueError("step acts on stop_gradient: target only, and takes no derivative")
        return self

    @model_validator(mode="after")
    def _acts_on_target(self) -> Self:
        stabilized = self.normalize_tangent or self.tangent_warmup_steps or self.clamp_tangent is not None
        if self.stop_gradient != "target" and (stabilized or self.tangent_scale != 1):
            names = "normalize_tangent, tangent_warmup_steps, tangent_scale and clamp_tangent"
            raise ValueError(f"{names} act on stop_gradient: target only")
        return self

    @classmethod
    def detached_like(cls, other: TangentLoss) -> Self:
        """Return the loss with a detached target and another loss's derivative and tangent settings."""
        shared = other.model_dump(include=set(TangentLoss.model_fields) - set(Loss.model_fields))
        return cls.model_validate(shared | {"stop_gradient": "target"})

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        x_t, t, r, cond = jump.x, jump.t, jump.r, jump.cond
        length = expand(t - r, x_t)
        if self.stop_gradient == "nowhere":
            v = velocity(x_t, t, cond)
            u, du = value_and_derivative_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=self.engine)
            return squared_norm(u - v + length * du)
        # No gradient in v: with velocity: self the diagonal learns from its own loss alone.
        with torch.no_grad():
            v = velocity(x_t, t, cond)
        if self.stop_gradient == "teacher_input":
            u, du_dt, transport = value_and_parts_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=self.engine)
            return squared_norm(u - v + length * (du_dt + transport))
        if self.step:
            # The step is a fraction of the timesteps, converted to t at first order.
            u, s = flow_map.mean_velocity(x_t, t, r, cond), t - self.step / flow_map.clock.dwarp_dt(t)
            change = change_over_step(flow_map, velocity, jump, torch.maximum(s, r), u, v, self.solver)
            g = u - v + self.tangent_scale * change
        else:
            u, du = value_and_derivative_along_flow(
                flow_map, x_t, t, r, v, cond=cond, engine=self.engine, detached=True
            )
            with torch.no_grad():
                # The warm-up scales the derivative alone: u - v is 0 for a student that starts as the teacher.
                g = u - v + self.tangent_scale * length * du
        with torch.no_grad():
            target = u - self.stabilize(g)
        return squared_norm(u - target)


@torch.no_grad()
def change_over_step(
    flow_map: FlowMap,
    velocity: VelocityField,
    jump: Jump,
    s: Float[Tensor, " batch"],
    u: Float[Tensor, "batch *event"],
    v: Float[Tensor, "batch *event"],
    solver: Literal["euler", "heun"],
) -> Float[Tensor, "batch *event"]:
    """Return the finite-step form of ``(t - r) du`` in the Eulerian residual, for one step from t to s along the flow.

    ``(X(x_s, s, r) - X(x_t, t, r)) / (t - s) = u - v + (s - r) (u - u(x_s, s, r)) / (t - s)``, with v the mean
    velocity of the solver's step (Song et al., arXiv 2303.01469, in terms of u). It vanishes where t = r.

    Args:
        flow_map: the map at the later point, a moving average for instance.
        s: time at the end of the step, ``r <= s <= t``.
        u: ``u(x_t, t, r)`` of the student.
        v: velocity at ``x_t``.
    """
    x_t, t, r, cond = jump.x, jump.t, jump.r, jump.cond
    step, start = expand(t - s, x_t), v
    # The mean velocity of both ends: the Euler point is off by the curvature, at first order of the step.
    if solver == "heun":
        v = (v + velocity(x_t - step * v, s, cond)) / 2
    later = flow_map.mean_velocity(x_t - step * v, s, r, cond)
    # Where t = s = r the numerator is 0: the smallest number keeps 0 / 0 away and changes no other value.
    rest = (s - r) / (t - s).clamp_min(torch.finfo(t.dtype).tiny)
    # The caller's residual has the velocity at the start; start - v replaces it by the mean over the step.
    return start - v + expand(rest, x_t) * (u - later)
