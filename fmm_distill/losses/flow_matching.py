"""The diagonal term: a jump of length 0 has the velocity itself."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.losses.base import LossSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["FlowMatchingSettings", "flow_matching"]


class FlowMatchingSettings(LossSettings):
    """Settings of the diagonal term."""

    summary: ClassVar[str] = "the diagonal u(x, t, t) is the velocity; trains no jump, so a term beside another loss"
    paper: ClassVar[str] = "arXiv 2210.02747; as a term arXiv 2505.18825"
    diagonal: ClassVar[bool] = True

    name: Literal["flow_matching"] = "flow_matching"
    """Which loss this is."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Whose velocity the diagonal is regressed on."""


def flow_matching(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: FlowMatchingSettings,
) -> Float[Tensor, " batch"]:
    """``|u(x_t, t, t) - v(x_t, t)|^2``, mean over the event, one number a sample; r plays no part.

    With the interpolant's velocity ``eps - x_0`` it is flow matching (Lipman et al., arXiv 2210.02747), whose
    minimizer is its conditional mean; with the teacher's, the tangent condition.
    """
    del r
    with torch.no_grad():
        v = velocity(x_t, t, cond)
    return squared_norm(flow_map.mean_velocity(x_t, t, t, cond) - v)
