"""Flow matching: the velocity of a jump of length 0."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.losses.base import Jump, Loss, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["FlowMatching"]


class FlowMatching(Loss):
    """``|u(x_t, t, t) - v(x_t, t)|^2``, mean over the event; r has no effect.

    With the interpolant's velocity ``eps - x_0`` it is flow matching (Lipman et al., arXiv 2210.02747), whose
    minimizer is its conditional mean; with the teacher's, the tangent condition.
    """

    summary: ClassVar[str] = (
        "the diagonal u(x, t, t) is the velocity; trains no jumps, so it is an extra loss or a stage"
    )
    paper: ClassVar[str] = "arXiv 2210.02747; as a term arXiv 2505.18825"
    diagonal: ClassVar[bool] = True
    without_data: ClassVar[str] = "set its velocity: teacher"

    name: Literal["flow_matching"] = "flow_matching"
    """Name of the loss."""
    velocity: Literal["teacher", "data"] = "teacher"
    """Velocity that the diagonal is regressed on: the teacher's, or the sample's own."""

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        with torch.no_grad():
            v = velocity(jump.x, jump.t, jump.cond)
        return squared_norm(flow_map.mean_velocity(jump.x, jump.t, jump.t, jump.cond) - v)
