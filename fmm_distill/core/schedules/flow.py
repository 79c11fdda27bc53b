"""The straight paths of flow matching, with a shift."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.core.schedules.base import check_steps
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["FlowMatching"]


class FlowMatching:
    """The axis itself, ``x = (1 - t) x_0 + t eps``, with the shift of Esser et al. 2024 (arXiv 2403.03206, eq. 23).

    Jumps are measured before the shift: ``t = shift s / (1 + (shift - 1) s)``, so that the grid of a pipeline that
    shifts equal steps of s is uniform.

    Args:
        uses_unshifted_time: the network is told s, not t.
    """

    t_max = 1.0

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000, *, uses_unshifted_time: bool = False) -> None:
        if shift <= 0:
            raise UserError(f"the scheduler's shift is {shift}; wanted a number above 0")
        self.shift, self.num_timesteps, self.uses_unshifted_time = shift, num_timesteps, uses_unshifted_time
        self.t_min = float(self._shifted(torch.tensor(1 / num_timesteps, dtype=torch.float64)))

    def _shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to 1, equal steps before the shift."""
        first = 1 / self.num_timesteps
        return self._shifted(first + (1 - first) * share.double())

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time before the shift."""
        t = t.double()
        return t / (self.shift - (self.shift - 1) * t)

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``warp`` in t."""
        return self.shift / (self.shift - (self.shift - 1) * t.double()).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``num_timesteps t``, or that of the time before the shift."""
        t = t.double().clamp_min(self.t_min)
        return (self.warp(t) if self.uses_unshifted_time else t) * self.num_timesteps

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """``1 - t`` and ``t``."""
        t = t.double()
        return 1 - t, t

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """One."""
        return torch.ones_like(t.double())

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Equal steps before the shift."""
        check_steps(steps, self.num_timesteps)
        return self._shifted(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def is_uniform(self, steps: int) -> bool:
        """Always."""
        return True
