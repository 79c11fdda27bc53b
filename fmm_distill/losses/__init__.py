"""The losses, one file each: settings and one pure function. A new one is a file and a line in each table."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fmm_distill.losses.base import LossSettings
from fmm_distill.losses.consistency import ConsistencySettings, consistency
from fmm_distill.losses.consistency_trajectory import ConsistencyTrajectorySettings, consistency_trajectory
from fmm_distill.losses.eulerian import EulerianSettings, eulerian
from fmm_distill.losses.flow_map_matching import FlowMapMatchingSettings, flow_map_matching
from fmm_distill.losses.flow_matching import FlowMatchingSettings, flow_matching
from fmm_distill.losses.lagrangian import LagrangianSettings, lagrangian
from fmm_distill.losses.mean_flow import MeanFlowSettings, mean_flow
from fmm_distill.losses.operator_regression import OperatorRegressionSettings, operator_regression
from fmm_distill.losses.progressive import ProgressiveSettings, progressive
from fmm_distill.losses.progressive_distillation import ProgressiveDistillationSettings, progressive_distillation
from fmm_distill.losses.terminal_velocity import TerminalVelocitySettings, terminal_velocity

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "LOSSES",
    "SETTINGS",
    "AnyLossSettings",
    "ConsistencySettings",
    "ConsistencyTrajectorySettings",
    "EulerianSettings",
    "FlowMapMatchingSettings",
    "FlowMatchingSettings",
    "LagrangianSettings",
    "LossSettings",
    "MeanFlowSettings",
    "OperatorRegressionSettings",
    "ProgressiveDistillationSettings",
    "ProgressiveSettings",
    "TerminalVelocitySettings",
    "consistency",
    "consistency_trajectory",
    "eulerian",
    "flow_map_matching",
    "flow_matching",
    "lagrangian",
    "mean_flow",
    "operator_regression",
    "progressive",
    "progressive_distillation",
    "terminal_velocity",
]

LOSSES: dict[str, Callable[..., Tensor]] = {
    "lagrangian": lagrangian,
    "eulerian": eulerian,
    "progressive": progressive,
    "flow_map_matching": flow_map_matching,
    "flow_matching": flow_matching,
    "mean_flow": mean_flow,
    "consistency": consistency,
    "consistency_trajectory": consistency_trajectory,
    "progressive_distillation": progressive_distillation,
    "operator_regression": operator_regression,
    "terminal_velocity": terminal_velocity,
}
AnyLossSettings = Annotated[
    LagrangianSettings
    | EulerianSettings
    | ProgressiveSettings
    | FlowMapMatchingSettings
    | FlowMatchingSettings
    | MeanFlowSettings
    | ConsistencySettings
    | ConsistencyTrajectorySettings
    | ProgressiveDistillationSettings
    | OperatorRegressionSettings
    | TerminalVelocitySettings,
    Field(discriminator="name"),
]
SETTINGS: dict[str, type[LossSettings]] = {
    "lagrangian": LagrangianSettings,
    "eulerian": EulerianSettings,
    "progressive": ProgressiveSettings,
    "flow_map_matching": FlowMapMatchingSettings,
    "flow_matching": FlowMatchingSettings,
    "mean_flow": MeanFlowSettings,
    "consistency": ConsistencySettings,
    "consistency_trajectory": ConsistencyTrajectorySettings,
    "progressive_distillation": ProgressiveDistillationSettings,
    "operator_regression": OperatorRegressionSettings,
    "terminal_velocity": TerminalVelocitySettings,
}
