"""Operator regression: the jump is regressed on the teacher's solved trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill.core.solvers import solve
from fmm_distill.losses.base import LossSettings, squared_norm

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["OperatorRegressionSettings", "operator_regression"]


class OperatorRegressionSettings(LossSettings):
    """Settings of operator regression."""

    summary: ClassVar[str] = "regression of jumps from noise on the teacher's solved trajectories (neural operator)"
    paper: ClassVar[str] = "arXiv 2211.13449; as a special case arXiv 2406.07507"

    name: Literal["operator_regression"] = "operator_regression"
    """Which loss this is."""
    velocity: Literal["teacher"] = "teacher"
    """Whose trajectories."""
    solver_steps: int = Field(default=8, ge=1, le=10_000)
    """RK4 steps from t to r; four calls of the teacher each."""


def operator_regression(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: OperatorRegressionSettings,
) -> Float[Tensor, " batch"]:
    """``|X(x_t, t, r) - x_r|^2`` with x_r solved from x_t, mean over the event, one number a sample.

    Zheng et al. (arXiv 2211.13449) take t at the noise (``pairs.prior: 1``). The solver's error, of fourth order in
    its step, is the target's.
    """
    with torch.no_grad():
        shares = torch.linspace(0, 1, settings.solver_steps + 1, dtype=t.dtype, device=t.device)
        x_r = solve(velocity, x_t, t - shares[:, None] * (t - r), cond=cond)
    return squared_norm(flow_map(x_t, t, r, cond) - x_r)
