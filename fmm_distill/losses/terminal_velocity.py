"""Terminal velocity matching: the Lagrangian loss on the map's own diagonal, learned from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeLoss, Jump, TargetNetwork, squared_norm
from fmm_distill.losses.lagrangian import Lagrangian

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["TerminalVelocity"]


class TerminalVelocity(DerivativeLoss):
    """``|d_r X(x_t, t, r) - sg u'(X, r, r)|^2 + |u(x_r, r, r) - v|^2``, ``v = eps - x_0``, means over the event.

    u' is the diagonal of ``target_map``, a moving average in the paper (arXiv 2511.19797). The first term is
    ``Lagrangian`` with ``stop_gradient="teacher_input"``, the second flow matching at the terminal time on the same
    sample's point.
    """

    summary: ClassVar[str] = (
        "the end of a jump moves with the diagonal of a moving average, which is learned from data (TVM)"
    )
    paper: ClassVar[str] = "arXiv 2511.19797"
    in_r: ClassVar[bool] = True
    without_data: ClassVar[str] = "take lagrangian with velocity: self and flow_matching in extra_losses"

    name: Literal["terminal_velocity"] = "terminal_velocity"
    """Name of the loss."""
    velocity: Literal["data"] = "data"
    """Velocity that teaches the diagonal: the sample's own eps - x_0."""
    target: Literal["student", "average"] = "average"
    """Map whose diagonal the end follows: the student, or its moving average."""

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return the moving average if the end follows it."""
        return None if self.target == "student" else self.target

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        source = flow_map if jump.target_map is None else jump.target_map
        end_moves = Lagrangian(stop_gradient="teacher_input", derivative=self.derivative)
        moved = end_moves(flow_map, diagonal(source), jump)
        with torch.no_grad():
            v = velocity(jump.x, jump.t, jump.cond)
            # The same sample's point on its own interpolant, at which data teach the diagonal of time r.
            x_r = jump.x - expand(jump.t - jump.r, jump.x) * v
        return moved + squared_norm(flow_map.mean_velocity(x_r, jump.r, jump.r, jump.cond) - v)
