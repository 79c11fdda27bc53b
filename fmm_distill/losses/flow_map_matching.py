"""Direct flow map matching: from data alone, by the round trip and its inverse."""

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

__all__ = ["FlowMapMatching"]


class FlowMapMatching(DerivativeLoss):
    """``|d_r X(y, t, r) - v|^2 + |X(y, t, r) - x_r|^2``, ``y = X(x_r, r, t)``, ``v = eps - x_0``, means over the event.

    x_r is the same sample's point at r, ``x_t - (t - r) v`` on the linear interpolant, so the velocity must be the
    sample's own. Where the second term vanishes, the minimizer of the first obeys the Lagrangian equation (arXiv
    2406.07507, proposition 3.11). The round trip needs both directions of time, so this loss evaluates the map also
    from r up to t (h < 0). Where ``jump.uniform`` is above one half, t and r are exchanged.
    """

    summary: ClassVar[str] = (
        "a jump there and back returns to its start and obeys the Lagrangian equation, from data alone (FMM)"
    )
    paper: ClassVar[str] = "arXiv 2406.07507, proposition 3.11"
    in_r: ClassVar[bool] = True
    without_data: ClassVar[str] = "take lagrangian"

    name: Literal["flow_map_matching"] = "flow_map_matching"
    """Name of the loss."""
    velocity: Literal["data"] = "data"
    """Velocity of the equation: the sample's own eps - x_0."""
    directions: Literal["both", "generate"] = "both"
    """Direction of the differentiated jump: either with equal chance, or from t down to r only."""

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        x_t, t, r, cond = jump.x, jump.t, jump.r, jump.cond
        with torch.no_grad():
            v = velocity(x_t, t, cond)
            swapped = (jump.uniform > 0.5) & (self.directions == "both")
            # Exchanged samples start their round trip at x_t itself.
            x_r = torch.where(expand(swapped, x_t).bool(), x_t, x_t - expand(t - r, x_t) * v)
            t, r = torch.where(swapped, r, t), torch.where(swapped, t, r)
        # With a graph: the gradient of both terms also passes through the way there.
        y = flow_map(x_r, r, t, cond)
        length = expand(t - r, y)
        u, du_dr = value_and_derivative_in_r(flow_map, y, t, r, cond=cond, engine=self.engine)
        return squared_norm(u - length * du_dr - v) + squared_norm(y - length * u - x_r)
