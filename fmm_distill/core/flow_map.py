"""The flow map ``X(x, t, r) = x - (t - r) u(x, t, r)`` and its mean velocity u."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING

from torch import nn

from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.time_axis import Clock
    from fmm_distill.core.velocity import VelocityField

__all__ = ["FlowMap", "LearnedFlowMap", "diagonal"]


class FlowMap(ABC):
    """A two-time map of the teacher's ODE: from ``x`` at time t to time r, identity at r = t by construction.

    What differs between maps is one function, the mean velocity as a function of the jump's length
    ``h = clock.warp(t) - clock.warp(r)``, and the clock that measures it.
    """

    clock: Clock
    t_max: float
    # Whether a call with a graph leaves hooks that forward mode has no rule for: blocks computed again, or gathered.
    needs_functional_jvp: bool = False

    @abstractmethod
    def mean_velocity_of_jump(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """u of the jump of length h that starts at t."""

    def mean_velocity(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        r: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """``u(x, t, r)``, which is the velocity where r = t (tangent condition)."""
        return self.mean_velocity_of_jump(x, t, self.clock.warp(t) - self.clock.warp(r), cond)

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        r: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """``X(x, t, r)``."""
        return x - expand(t - r, x) * self.mean_velocity(x, t, r, cond)


class LearnedFlowMap(FlowMap, nn.Module):
    """A flow map with parameters: what a trainer trains."""


def diagonal(flow_map: FlowMap) -> VelocityField:
    """The velocity that a map implies, ``u(x, t, t)``: what a self-distilled loss takes for its teacher's."""

    def velocity(
        x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        return flow_map.mean_velocity(x, t, t, cond)

    return velocity
