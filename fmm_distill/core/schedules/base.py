"""The interface of a noise schedule on the time axis."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from fmm_distill.core.time_axis import TimeAxis
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Schedule", "check_steps", "variance_preserving_levels"]


class Schedule(TimeAxis, Protocol):
    """The noise levels of a diffusers teacher, continuous in t.

    Attributes:
        num_timesteps: of its scheduler, and the largest number of steps of a sampler.
        kind: the name of the family: ``discrete``, ``angular``, ``exploding`` or ``flow``.
        folds: a stock scheduler of first order has these noise levels, so that a student folds into a stock network.
    """

    kind: str
    folds: bool
    num_timesteps: int

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time input of the network at t; below t_min, that at t_min."""
        ...

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma of the teacher's path ``x = alpha x_0 + sigma eps``, each of shape ``[batch]``."""
        ...

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``alpha + sigma``, the factor from coordinates of the time axis to the teacher's."""
        ...

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return ``steps + 1`` decreasing times from t_max to 0, with jumps of equal length as nearly as possible.

        Raises:
            UserError: if there are more steps than timesteps, or none.
        """
        ...

    def to_config(self) -> dict[str, Any]:
        """Return the noise levels as JSON, for a pipeline that measures jumps without this package."""
        ...

    def is_uniform(self, steps: int) -> bool:
        """Return whether all jumps of ``grid(steps)`` have the same length, so that one bias represents it."""
        ...


def check_steps(steps: int, timesteps: int) -> None:
    """Check that a sampler can take ``steps`` steps on ``timesteps`` timesteps.

    Raises:
        UserError: otherwise.
    """
    if not 1 <= steps <= timesteps:
        raise UserError(f"{steps} sampling steps; expected 1 to {timesteps}, the teacher's number of timesteps")


def variance_preserving_levels(t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
    """Return alpha and sigma of a variance-preserving teacher at t, with ``alpha^2 + sigma^2 = 1``."""
    t = t.double()
    # t fixes the ratio sigma / alpha = t / (1 - t), and the squares of both add up to 1.
    norm = ((1 - t).square() + t.square()).sqrt()
    return (1 - t) / norm, t / norm
