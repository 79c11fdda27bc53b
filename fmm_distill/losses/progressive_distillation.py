"""Progressive distillation and shortcut: the progressive loss on a dyadic grid of times."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from fmm_distill.losses.base import Jump, Loss, TargetNetwork
from fmm_distill.losses.progressive import Progressive
from fmm_distill.losses.time_sampling import TimeSampling

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.flow_map import FlowMap
    from fmm_distill.core.velocity import VelocityField

__all__ = ["ProgressiveDistillation"]


class ProgressiveDistillation(Loss):
    """``Progressive`` with two equal pieces; the grid comes from ``time_sampling.dyadic``.

    A DDIM step is an Euler step on this axis, so ``target="ode"`` is the first stage of Salimans and Ho (arXiv
    2202.00512) and a map's own half jumps are the later ones; with the student's own and ``flow_matching`` as an extra
    loss, shortcut models (arXiv 2410.12557).
    """

    summary: ClassVar[str] = (
        "one jump equals two of half its length, on a dyadic grid (target: student, with flow_matching, shortcut)"
    )
    paper: ClassVar[str] = "arXiv 2202.00512; shortcut arXiv 2410.12557"
    # The advice of an error message: eight intervals at most. ``accepts`` takes any number of levels.
    needed_sampling: ClassVar[TimeSampling | None] = TimeSampling(prior=0, dyadic=3)

    name: Literal["progressive_distillation"] = "progressive_distillation"
    """Name of the loss."""
    velocity: Literal["teacher"] = "teacher"
    """Velocity of the solver's steps (target: ode)."""
    target: Literal["student", "average", "frozen", "ode"] = "average"
    """Half jumps of the student, its moving average, a frozen copy, or the teacher's DDIM steps."""

    @property
    def target_network(self) -> TargetNetwork | None:
        """Return the copy that makes the half jumps."""
        return self.target if self.target in ("average", "frozen") else None

    @property
    def needs_velocity_term(self) -> bool:
        """Return whether the target is the student or its average; a frozen copy starts as the teacher."""
        return self.target in ("student", "average")

    def accepts(self, sampling: TimeSampling) -> bool:
        """Return whether the times are dyadic; any number of levels will do."""
        return sampling.dyadic >= 1

    def __call__(self, flow_map: FlowMap, velocity: VelocityField, jump: Jump) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``."""
        # A DDIM step is an Euler step. Progressive accepts a solver other than its default with target: ode only.
        solver: Literal["euler", "heun"] = "euler" if self.target == "ode" else "heun"
        return Progressive(target=self.target, solver=solver)(flow_map, velocity, jump)
