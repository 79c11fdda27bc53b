"""Terminal velocity matching: the Lagrangian loss on the map's own diagonal, learned from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch

from fmm_distill.core.flow_map import diagonal
from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import DerivativeSettings, squared_norm
from fmm_distill.losses.lagrangian import LagrangianSettings, lagrangian

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["TerminalVelocitySettings", "terminal_velocity"]


class TerminalVelocitySettings(DerivativeSettings):
    """Settings of terminal velocity matching."""

    summary: ClassVar[str] = "the end of a jump moves with a moving average's velocity, which data teach (TVM)"
    paper: ClassVar[str] = "arXiv 2511.19797"
    in_r: ClassVar[bool] = True
    takes: ClassVar[frozenset[str]] = frozenset({"target_map"})

    name: Literal["terminal_velocity"] = "terminal_velocity"
    """Which loss this is."""
    velocity: Literal["data"] = "data"
    """Whose velocity teaches the diagonal: the sample's own eps - x_0."""
    target: Literal["student", "average"] = "average"
    """Whose diagonal the end follows: the student's own, or that of its moving average."""


def terminal_velocity(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: TerminalVelocitySettings,
    target_map: FlowMap | None = None,
) -> Float[Tensor, " batch"]:
    """``|d_r X(x_t, t, r) - sg u'(X, r, r)|^2 + |u(x_r, r, r) - v|^2``, ``v = eps - x_0``, one number a sample.

    u' is ``target_map``'s diagonal, a moving average in the paper (arXiv 2511.19797). The first term is ``lagrangian``
    with ``stop="teacher"``, the second flow matching at the terminal time on the same sample's point.
    """
    follow = LagrangianSettings(stop="teacher", derivative=settings.derivative)
    moved = lagrangian(
        flow_map, diagonal(flow_map if target_map is None else target_map), x_t, t, r, cond=cond, settings=follow
    )
    with torch.no_grad():
        v = velocity(x_t, t, cond)
        x_r = x_t - expand(t - r, x_t) * v
    return moved + squared_norm(flow_map.mean_velocity(x_r, r, r, cond) - v)
