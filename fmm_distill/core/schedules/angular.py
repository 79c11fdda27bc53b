"""A variance-preserving schedule whose network is conditioned on an angle."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from fmm_distill.core.schedules.base import check_steps, on_the_circle
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["Angular"]


class Angular:
    """``alpha = cos(phi)``, ``sigma = sin(phi)`` and a network that is told ``2 phi / pi``, continuous in phi.

    The angle is that of Salimans and Ho 2022 (arXiv 2202.00512, appendix D). Jumps are measured in the s of diffusers"
    ``IPNDMScheduler``, ``sigma = sin(pi s / 2)^2``, so that a grid of equal jumps has its levels; it starts in pure
    noise.

    Args:
        num_timesteps: N; t_min is where the network is told 1 / N. The slope of s is 8 there for N = 1000; at N's own
            first level, s = 1 / N, it is 200, and the derivative in r would be noise.
    """

    kind = "angular"
    folds = False
    t_max = 1.0

    def __init__(self, num_timesteps: int = 1000) -> None:
        if num_timesteps < 2:
            raise UserError(f"the scheduler's num_train_timesteps is {num_timesteps}; wanted at least 2")
        self.num_timesteps = num_timesteps
        tangent = math.tan(math.pi / 2 / num_timesteps)
        self.t_min = tangent / (1 + tangent)
        self._first = float(self.warp(torch.tensor(self.t_min, dtype=torch.float64)))

    def _time(self, s: Tensor) -> Tensor:
        sigma = (s * math.pi / 2).sin().square()
        # 1 - sigma^2 would cancel next to noise.
        alpha = (s * math.pi / 2).cos() * (1 + sigma).sqrt()
        return sigma / (alpha + sigma)

    def time_at(self, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The time at a share of the way from t_min to 1, equal steps of s."""
        return self._time(self._first + (1 - self._first) * share.double()).clamp(self.t_min, self.t_max)

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The s of the level; it goes as the root of t next to data."""
        alpha, sigma = self.alpha_sigma(t)
        # Of asin(sqrt(sigma)) the derivative in t would be infinity times zero at t = 1.
        return torch.atan2((sigma * (1 + sigma)).sqrt(), alpha) * 2 / math.pi

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """The derivative of ``warp`` in t; below t_min what it is there."""
        t = t.double().clamp_min(self.t_min)
        _, sigma = self.alpha_sigma(t)
        return ((1 + sigma) / sigma).sqrt() / math.pi * self.scale(t).square()

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``2 phi / pi``, in (0, 1]."""
        t = t.double().clamp_min(self.t_min)
        return torch.atan2(t, 1 - t) * 2 / math.pi

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """The teacher's alpha and sigma, with alpha^2 + sigma^2 = 1."""
        return on_the_circle(t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """``alpha + sigma``."""
        alpha, sigma = self.alpha_sigma(t)
        return alpha + sigma

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """The levels of ``IPNDMScheduler``, equal steps of s, and data at their end."""
        check_steps(steps, self.num_timesteps)
        return self._time(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)

    def to_config(self) -> dict[str, Any]:
        """The noise levels as JSON."""
        return {"kind": self.kind}

    def is_uniform(self, steps: int) -> bool:
        """Always."""
        return True
