"""Direct flow map matching: from data alone, by the round trip and its inverse."""

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

__all__ = ["FlowMapMatchingSettings", "flow_map_matching"]


class FlowMapMatchingSettings(DerivativeSettings):
    """Settings of direct flow map matching."""

    summary: ClassVar[str] = "the Lagrangian equation at the end of a round trip, and its return, from data alone (FMM)"
    paper: ClassVar[str] = "arXiv 2406.07507, proposition 3.11"
    in_r: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"share"})

    name: Literal["flow_map_matching"] = "flow_map_matching"
    """Which loss this is."""
    velocity: Literal["data"] = "data"
    """Whose velocity: the sample's own eps - x_0."""
    directions: Literal["both", "generate"] = "both"
    """Which way the jump that is differentiated goes: either way with equal chance, or from t down to r only."""


def flow_map_matching(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: FlowMapMatchingSettings,
    share: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """``|d_r X(y, t, r) - v|^2 + |X(y, t, r) - x_r|^2``, ``y = X(x_r, r, t)``, ``v = eps - x_0``, one a sample.

    x_r is the same sample's point at r, ``x_t - (t - r) v`` on the linear interpolant, so velocity must be the
    sample's own. Given that the second term vanishes, the first one's minimizer is the Lagrangian equation (arXiv
    2406.07507, proposition 3.11). Where ``share`` is above one half t and r change places: both directions of time
    are needed for the round trip.
    """
    engine = "exact" if settings.derivative == "auto" else settings.derivative
    with torch.no_grad():
        v = velocity(x_t, t, cond)
        swapped = (share > 0.5) & (settings.directions == "both")
        x_r = torch.where(expand(swapped, x_t).bool(), x_t, x_t - expand(t - r, x_t) * v)
        t, r = torch.where(swapped, r, t), torch.where(swapped, t, r)
    y = flow_map(x_r, r, t, cond)
    length = expand(t - r, y)
    u, du_dr = value_and_derivative_in_r(flow_map, y, t, r, cond=cond, engine=engine)
    return squared_norm(u - length * du_dr - v) + squared_norm(y - length * u - x_r)
