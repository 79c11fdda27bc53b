"""One evaluation of a flow map, as a function of the variables that it is differentiated in."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap

__all__ = ["MapCall"]


class MapCall(NamedTuple):
    """The arguments of ``u(x, t, r)``.

    Attributes:
        x: shape ``[batch, *event]``.
        t, r: start and end of the jumps, shape ``[batch]``.
    """

    flow_map: FlowMap
    x: Float[Tensor, "batch *event"]
    t: Float[Tensor, " batch"]
    r: Float[Tensor, " batch"]
    cond: Conditioning | None = None

    @property
    def length(self) -> Tensor:
        """The length of the jumps, ``h = warp(t) - warp(r)``, shape ``[batch]``."""
        clock = self.flow_map.clock
        return clock.warp(self.t) - clock.warp(self.r)

    def value(self) -> Tensor:
        """Return ``u(x, t, r)``."""
        return self.by_start(self.x, self.t)

    def by_length(self, h: Tensor) -> Tensor:
        """Return u of the jumps of length h that start at t."""
        return self.flow_map.mean_velocity_of_jump(self.x, self.t, h, self.cond)

    def by_start(self, x: Tensor, t: Tensor) -> Tensor:
        """Return u of the jumps from x and t to r."""
        return self.flow_map.mean_velocity(x, t, self.r, self.cond)
