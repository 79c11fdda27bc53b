"""A variance-preserving schedule whose network is conditioned on an angle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules.base import check_steps, variance_preserving_levels
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Angular"]


class Angular:
    """``alpha = cos(phi)``, ``sigma = sin(phi)``, continuous in phi, with the network's time ``2 phi / pi``.

    The angle is that of Salimans and Ho 2022 (arXiv 2202.00512, appendix D). Jumps are measured in the s of diffusers'
    ``IPNDMScheduler``, ``sigma = sin(pi s / 2)^2``, so that a grid of equal jumps has its noise levels. It starts at
    pure noise.

    Args:
        num_timesteps: N; the network's time is 1 / N at t_min. For N = 1000 the slope of s is 8 there. At the
            scheduler's first level, s = 1 / N, it is 200, and the derivative in r would be noise.
    """

    kind = "angular"
    folds = False
    t_max = 1.0

    def __init__(self, num_timesteps: int = 1000) -> None:
        if num_timesteps < 2:
            raise UserError(f"the scheduler's num_train_timesteps is {num_timesteps}; expected at least 2")
        self.num_timesteps = num_timesteps
        # The angle pi / (2 N), at which the network's time is 1 / N.
        tangent = math.tan(math.pi / 2 / num_timesteps)
        self.t_min = tangent / (1 + tangent)
        self._first = float(self.warp(torch.tensor(self.t_min, dtype=torch.float64)))

    def _time(self, s: Tensor) -> Tensor:
        sigma = (s * math.pi / 2).sin().square()
        # alpha as a product: 1 - sigma^2 would cancel close to noise.
        alpha = (s * math.pi / 2).cos() * (1 + sigma).sqrt()
        return sigma / (alpha + sigma)

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (t_min) to 1 (t = 1), in equal steps of s."""
        # Clamped, because rounding can leave the interval by the last bit.
        return self._time(self._first + (1 - self._first) * progress.double()).clamp(self.t_min, self.t_max)

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return s, which is proportional to the root of t close to data."""
        alpha, sigma = self.alpha_sigma(t)
        # Not asin(sqrt(sigma)), whose derivative in t is infinity times zero at t = 1.
        return torch.atan2((sigma * (1 + sigma)).sqrt(), alpha) * 2 / math.pi

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp`` in t; below t_min, that at t_min."""
        t = t.double().clamp_min(self.t_min)
        _, sigma = self.alpha_sigma(t)
        # ds/dphi times dphi/dt, where dphi/dt is the square of the scale.
        return ((1 + sigma) / sigma).sqrt() / math.pi * self.scale(t).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``2 phi / pi``, in (0, 1]."""
        t = t.double().clamp_min(self.t_min)
        # atan2 instead of a quotient, which would be infinite at t = 1.
        return torch.atan2(t, 1 - t) * 2 / math.pi

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return alpha and sigma, with ``alpha^2 + sigma^2 = 1``."""
        return variance_preserving_levels(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``alpha + sigma``."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return the times of ``IPNDMScheduler``, in equal steps of s, and 0 at the end."""
        check_steps(steps, self.num_timesteps)
        return self._time(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def to_config(self) -> dict[str, Any]:
        """Return the noise levels as JSON."""
        return {"kind": self.kind}

    def is_uniform(self, steps: int) -> bool:
        """Return True: jumps are measured in s."""
        return True
