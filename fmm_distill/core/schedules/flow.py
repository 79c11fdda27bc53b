"""The straight paths of flow matching, with a shift."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules.base import check_steps
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["FlowMatching"]


class FlowMatching:
    """The path of the time axis, ``x = (1 - t) x_0 + t eps``, shifted as in Esser et al. 2024 (arXiv 2403.03206).

    Jumps are measured in the time s before the shift, ``t = shift s / (1 + (shift - 1) s)`` (eq. 23), so that the grid
    of a pipeline that shifts equal steps of s is uniform.

    Args:
        num_timesteps: of the scheduler. With 1 the network's time is t itself, and the smallest time is 1 / 1000.
        uses_unshifted_time: the network's time is s, not t.

    Attributes:
        time_scale: the network's time at t = 1.
    """

    kind = "flow"
    folds = True
    t_max = 1.0

    def __init__(self, shift: float = 1.0, num_timesteps: int = 1000, *, uses_unshifted_time: bool = False) -> None:
        if shift <= 0:
            raise UserError(f"the scheduler's shift is {shift}; expected a number above 0")
        self.shift, self.uses_unshifted_time = shift, uses_unshifted_time
        self.time_scale, self.num_timesteps = num_timesteps, num_timesteps if num_timesteps > 1 else 1000
        # Timestep 1, the smallest of the scheduler, before the shift.
        self.t_min = float(self._shifted(torch.tensor(1 / self.num_timesteps, dtype=torch.float64)))

    def _shifted(self, s: Tensor) -> Tensor:
        return self.shift * s / (1 + (self.shift - 1) * s)

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (t_min) to 1 (t = 1), in equal steps before the shift."""
        first = 1 / self.num_timesteps
        return self._shifted(first + (1 - first) * progress.double())

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time before the shift."""
        t = t.double()
        return t / (self.shift - (self.shift - 1) * t)

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp`` in t."""
        return self.shift / (self.shift - (self.shift - 1) * t.double()).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``time_scale`` times t, or times the time before the shift."""
        # No smaller time was trained.
        t = t.double().clamp_min(self.t_min)
        return (self.warp(t) if self.uses_unshifted_time else t) * self.time_scale

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return ``1 - t`` and ``t``."""
        t = t.double()
        return 1 - t, t

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ones."""
        return torch.ones_like(t.double())

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return times of equal steps before the shift."""
        check_steps(steps, self.num_timesteps)
        return self._shifted(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def to_config(self) -> dict[str, Any]:
        """Return the noise levels as JSON."""
        return {"kind": self.kind, "shift": self.shift, "unshifted_time": self.uses_unshifted_time}

    def is_uniform(self, steps: int) -> bool:
        """Return True: jumps are measured before the shift."""
        return True
