"""Progressive distillation and shortcut: the progressive loss on a dyadic grid of times."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fmm_distill.losses.base import LossSettings
from fmm_distill.losses.progressive import ProgressiveSettings, progressive

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ProgressiveDistillationSettings", "progressive_distillation"]


class ProgressiveDistillationSettings(LossSettings):
    """Settings of progressive distillation."""

    summary: ClassVar[str] = (
        "one jump equals two of half its length, on a dyadic grid (target: student, with flow_matching, shortcut)"
    )
    paper: ClassVar[str] = "arXiv 2202.00512; shortcut arXiv 2410.12557"
    takes: ClassVar[frozenset[str]] = frozenset({"target_map", "share"})

    name: Literal["progressive_distillation"] = "progressive_distillation"
    """Which loss this is."""
    velocity: Literal["teacher"] = "teacher"
    """Whose velocity the solver's steps take (target: ode)."""
    target: Literal["student", "average", "frozen", "ode"] = "average"
    """Whose half jumps: the student's own, its moving average's, a frozen copy's, or the teacher's DDIM steps."""

    @property
    def sees_no_teacher(self) -> bool:
        """With its own jumps or its average's; a frozen copy starts as the teacher."""
        return self.target in ("student", "average")


def progressive_distillation(
    flow_map: FlowMap,
    velocity: VelocityField,
    x_t: Float[Tensor, "batch *event"],
    t: Float[Tensor, " batch"],
    r: Float[Tensor, " batch"],
    *,
    cond: Conditioning | None = None,
    settings: ProgressiveDistillationSettings,
    target_map: FlowMap | None = None,
    share: Float[Tensor, " batch"],
) -> Float[Tensor, " batch"]:
    """``progressive`` with two equal pieces; the grid comes from ``pairs.dyadic``.

    A DDIM step is an Euler step on this axis, so ``target="ode"`` is the first stage of Salimans and Ho (arXiv
    2202.00512) and a map's own half jumps are the later ones; with the student's own and ``flow_matching`` beside it,
    shortcut models (arXiv 2410.12557).
    """
    if settings.target == "ode":
        halves = ProgressiveSettings(target="ode", solver="euler")
    else:
        halves = ProgressiveSettings(target=settings.target)
    return progressive(flow_map, velocity, x_t, t, r, cond=cond, settings=halves, target_map=target_map, share=share)
