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
    """A two-time map of a velocity field's ODE, from x at time t to time r; the identity at r = t by construction.

    A subclass defines the mean velocity as a function of the length of the jump,
    ``h = clock.warp(t) - clock.warp(r)``. For a discrete schedule this is a fraction of the teacher's timesteps; where
    ``warp(t) = t``, it is t - r. Jumps go towards data, r <= t and h >= 0. Only ``flow_map_matching`` also trains the
    map towards noise, with h < 0.

    The map is X of Boffi, Albergo and Vanden-Eijnden 2024 (arXiv 2406.07507) on the time axis of ``core.time_axis``.

    Attributes:
        clock: measures the length of jumps.
        t_max: the latest start of a jump.
        needs_functional_jvp: a call with a graph installs hooks that dual tensors do not pass: blocks are computed
            again in the backward pass, or weights are gathered from other processes. ``torch.func.jvp`` is used then.
    """

    clock: Clock
    t_max: float
    needs_functional_jvp: bool = False

    @abstractmethod
    def mean_velocity_of_jump(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        h: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return the mean velocity u of the jump of length h that starts at t, shape ``[batch, *event]``."""

    def mean_velocity(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        r: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return ``u(x, t, r)``, the velocity ``v(x, t)`` at r = t (tangent condition)."""
        return self.mean_velocity_of_jump(x, t, self.clock.warp(t) - self.clock.warp(r), cond)

    def __call__(
        self,
        x: Float[Tensor, "batch *event"],
        t: Float[Tensor, " batch"],
        r: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch *event"]:
        """Return ``X(x, t, r)``, shape ``[batch, *event]``."""
        # The factor t - r makes X the identity at r = t, whatever the network returns.
        return x - expand(t - r, x) * self.mean_velocity(x, t, r, cond)


class LearnedFlowMap(FlowMap, nn.Module):
    """A flow map with parameters, to be trained."""


def diagonal(flow_map: FlowMap) -> VelocityField:
    """Return the velocity field of a map, ``u(x, t, t)``, which self-distillation uses as its teacher's."""

    def velocity(
        x: Float[Tensor, "batch *event"], t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        return flow_map.mean_velocity(x, t, t, cond)

    return velocity
