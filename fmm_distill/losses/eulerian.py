"""The Eulerian loss: the map's end stays where it is while its start moves with the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.core.derivatives.engines import value_and_derivative_along_flow, value_and_parts_along_flow
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["EulerianSettings", "TangentSettings", "change_over_step", "eulerian", "steadied"]


class TangentSettings(DerivativeSettings):
    """What keeps a detached Eulerian target steady."""

    normalize_tangent: bool = False
    """Divide the target's step by its norm plus 0.1 (per sample); needs a detached target."""
    tangent_warmup_steps: int = Field(default=0, ge=0, le=40_000_000)
    """Steps over which the derivative's share of the target grows from 0 to 1; needs a detached target."""
    tangent_scale: float = Field(default=1.0, ge=0, le=1)
    """The derivative's share of the target once warmed up; needs a detached target where it is not 1."""
    clamp_tangent: float | None = Field(default=None, gt=0, le=1e9)
    """Largest step of the target in any one value, before the normalization; needs a detached target."""

    @property
    def keeps_graph(self) -> bool:
        """Where the target is not detached."""
        return getattr(self, "stop", "target") != "target"

    def at_step(self, step: int) -> Self:
        """The tangent's share after ``step`` steps of its warm-up."""
        if step >= self.tangent_warmup_steps:
            return self
        return self.model_copy(update={"tangent_scale": self.tangent_scale * step / self.tangent_warmup_steps})


class EulerianSettings(TangentSettings):
    """Settings of the Eulerian loss."""

    summary: ClassVar[str] = (
        "a jump ends in the same place wherever on a trajectory it starts (EMD; velocity: self, ESD)"
    )
    paper: ClassVar[str] = "arXiv 2406.07507; ESD arXiv 2505.18825; detached arXiv 2506.14603"

    name: Literal["eulerian"] = "eulerian"
    """Which loss this is."""
    velocity: Literal["teacher", "self"] = "teacher"
    """Whose velocity the start follows: the teacher's, or the student's own diagonal (add flow_matching then)."""
    stop: Literal["none", "teacher", "target"] = "target"
    """Where gradients stop: nowhere in the student, at the term that holds the velocity, or at a detached target."""
    step: float = Field(default=0.0, ge=0, lt=1)
    """Share of the teacher's timesteps over which the change along the flow is taken; 0: its derivative."""
    solver: Literal["euler", "heun"] = "heun"
    """How the velocity makes the step; acts on a step above 0 only."""

    @property
    def sees_no_teacher(self) -> bool:
        """With the student's own velocity."""
        return self.velocity == "self"

    @property
    def differentiates(self) -> bool:
        """Without a finite step."""
        return self.step == 0

    @model_validator(mode="after")
    def _acts_on_a_step(self) -> Self:
        if self.step == 0 and self.solver != "heun":
            raise ValueError("solver acts on a finite step only; set loss.step")
        if self.step and (self.stop != "target" or self.derivative != "auto"):
            raise ValueError("step acts on stop: target only, and takes no derivative")
        return self

    @model_validator(mode="after")
    def _acts_on_target(self) -> Self:
        steadied = self.normalize_tangent or self.tangent_warmup_steps or self.clamp_tangent is not None
        if self.stop != "target" and (steadied or self.tangent_scale != 1):
            names = "normalize_tangent, tangent_warmup_steps, tangent_scale and clamp_tangent"
            raise ValueError(f"{names} act on stop: target only")
        return self


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
    - ``stop="teacher"``: the gradient passes through ``d_t X`` but not through ``grad X . v`` (the rule of ESD,
      arXiv 2505.18825, eq. 94).
    - ``stop="target"``: u is regressed on a detached ``u - g``, g the residual (AYF-EMD, arXiv 2506.14603;
      MeanFlow, arXiv 2505.13447, eq. 9 to 11, with the teacher's velocity). ``normalize_tangent`` takes
      ``g / (|g| + 0.1)`` with the norm over the event (sCM, arXiv 2410.11081, section 4). With a ``step`` g is
      ``change_over_step``: a network's own roughness in time is averaged over it, where a derivative takes it whole.
    """
    engine = "exact" if settings.derivative == "auto" else settings.derivative
    length = expand(t - r, x_t)
    if settings.stop == "none":
        v = velocity(x_t, t, cond)
        u, du = value_and_derivative_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=engine)
        return squared_norm(u - v + length * du)
    with torch.no_grad():
        v = velocity(x_t, t, cond)
    if settings.stop == "teacher":
        u, du_dt, transport = value_and_parts_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=engine)
        return squared_norm(u - v + length * (du_dt + transport))
    if settings.step:
        u, s = flow_map.mean_velocity(x_t, t, r, cond), t - settings.step / flow_map.clock.dwarp_dt(t)
        change = change_over_step(
            flow_map, velocity, x_t, t, torch.maximum(s, r), r, u, v, cond=cond, solver=settings.solver
        )
        g = u - v + settings.tangent_scale * change
    else:
        u, du = value_and_derivative_along_flow(flow_map, x_t, t, r, v, cond=cond, engine=engine, detached=True)
        with torch.no_grad():
            g = u - v + settings.tangent_scale * length * du
    with torch.no_grad():
        target = u - steadied(g, settings)
    return squared_norm(u - target)


@torch.no_grad()
def change_over_step(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    s: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    u: Float[Tensor, "batch *event"],
    v: Float[Tensor, "batch *event"],
    *,
    cond: Conditioning | None,
    solver: Literal["euler", "heun"],
) -> Float[Tensor, "batch *event"]:
    """What takes the place of ``(t - r) du`` in the Eulerian residual where t goes to s in one step along the flow.

    ``(X(x_s, s, r) - X(x_t, t, r)) / (t - s) = u - v + (s - r) (u - u(x_s, s, r)) / (t - s)``, with v the mean
    velocity of the solver's step (Song et al., arXiv 2303.01469, on u). Where t = r nothing is left of it.

    Args:
        u, v: ``u(x_t, t, r)`` of the map, and the velocity at ``x_t``.
    """
    step, start = expand(t - s, x_t), v
    if solver == "heun":
        v = (v + velocity(x_t - step * v, s, cond)) / 2
    later = flow_map.mean_velocity(x_t - step * v, s, r, cond)
    rest = (s - r) / (t - s).clamp_min(torch.finfo(t.dtype).tiny)
    return start - v + expand(rest, x_t) * (u - later)


def steadied(g: Float[Tensor, "batch *event"], settings: TangentSettings) -> Float[Tensor, "batch *event"]:
    """The step of a detached target, clamped and normalized as the settings say."""
    if settings.clamp_tangent is not None:
        g = g.clamp(-settings.clamp_tangent, settings.clamp_tangent)
    if settings.normalize_tangent:
        g = g / expand(g.flatten(1).norm(dim=1) + 0.1, g)
    return g
