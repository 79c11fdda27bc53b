"""What every noise schedule has on the time axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fmm_distill.core.time_axis import TimeAxis
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Schedule", "check_steps", "on_the_circle"]


class Schedule(TimeAxis, Protocol):
    """The noise levels of a diffusers teacher, continuous in t.

    Attributes:
        num_timesteps: into how many timesteps its scheduler divides the way: the most steps that a sampler takes.
        kind: the name of the family: ``discrete``, ``angular``, ``exploding`` or ``flow``.
        folds: a stock scheduler of first order has these noise levels, so that a student folds into a stock network.
    """

    kind: str
    folds: bool
    num_timesteps: int

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """What the network is told at t; below t_min what it is told there."""
        ...

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's own ``x = alpha x_0 + sigma eps``."""
        ...

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``: the teacher's coordinates are those of the axis times this."""
        ...

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """``steps + 1`` decreasing times, from t_max to data: jumps of one length, as nearly as the schedule has them.

        Raises:
            UserError: if there are more steps than timesteps, or none.
        """
        ...

    def to_config(self) -> dict[str, Any]:
        """The noise levels as JSON, for a pipeline that measures jumps without this package."""
        ...

    def is_uniform(self, steps: int) -> bool:
        """Whether all jumps of ``grid(steps)`` have one length, so that it folds into one bias."""
        ...


def check_steps(steps: int, timesteps: int) -> None:
    """Raise ``UserError`` unless a sampler can take ``steps`` steps on ``timesteps`` timesteps."""
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps; expected 1 to {timesteps}, the teacher's number of timesteps")


def on_the_circle(t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    """Alpha and sigma of a variance-preserving teacher at t."""
    t = t.double()
    norm = ((1 - t).square() + t.square()).sqrt()
    return (1 - t) / norm, t / norm
