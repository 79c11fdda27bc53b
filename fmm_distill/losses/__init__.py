"""The losses, one file each: settings and one pure function. A new one is a file and a line in ``LOSSES``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from fmm_distill.losses.base import LossSettings, Weight, weigh
from fmm_distill.losses.eulerian import EulerianSettings, eulerian
from fmm_distill.losses.lagrangian import LagrangianSettings, lagrangian

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor

__all__ = [
    "LOSSES",
    "AnyLossSettings",
    "EulerianSettings",
    "LagrangianSettings",
    "LossSettings",
    "Weight",
    "eulerian",
    "lagrangian",
    "weigh",
]

LOSSES: dict[str, Callable[..., Tensor]] = {"lagrangian": lagrangian, "eulerian": eulerian}
AnyLossSettings = Annotated[LagrangianSettings | EulerianSettings, Field(discriminator="name")]
