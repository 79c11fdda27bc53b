"""The variance-exploding schedules of EDM and of score matching."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import torch

from fmm_distill.core.schedules.base import check_steps
from fmm_distill.errors import UserError

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

__all__ = ["VarianceExploding"]


class VarianceExploding:
    """``x = x_0 + sigma eps`` on the time axis: ``t = sigma / (1 + sigma)``.

    Jumps are measured by the progress from sigma_min to sigma_max in ``sigma^(1 / rho)`` (Karras et al. 2022,
    arXiv 2206.00364, eq. 5), or in log sigma if rho is infinite. Below sigma_min the length is constant.

    Args:
        network_input: the network's time input: sigma itself (Song et al. 2021, arXiv 2011.13456), ``log(sigma) / 4``
            (Karras), or ``2 atan(sigma) / pi`` (stable audio, arXiv 2404.10301).
    """

    kind = "exploding"
    folds = False

    def __init__(
        self,
        sigma_min: float,
        sigma_max: float,
        *,
        # The value of Karras et al., table 1.
        rho: float = 7.0,
        network_input: Literal["sigma", "log", "atan"] = "log",
        num_timesteps: int = 1000,
    ) -> None:
        if not 0 < sigma_min < sigma_max:
            raise UserError(f"the scheduler's sigmas run from {sigma_min} to {sigma_max}; expected 0 < min < max")
        self.sigma_min, self.sigma_max, self.rho, self.network_input = sigma_min, sigma_max, rho, network_input
        self.num_timesteps = num_timesteps
        self.t_min, self.t_max = sigma_min / (1 + sigma_min), sigma_max / (1 + sigma_max)
        ends = torch.tensor([sigma_min, sigma_max], dtype=torch.float64)
        self._low, self._high = self._power(ends).tolist()

    def _power(self, sigma: Tensor) -> Tensor:
        return sigma.log() if math.isinf(self.rho) else sigma ** (1 / self.rho)

    def _sigma(self, t: Tensor) -> Tensor:
        """Return sigma at t, at least sigma_min."""
        # Below sigma_min the network is not trained, and log sigma would be -infinity at data.
        t = t.double().clamp_min(self.t_min)
        return t / (1 - t)

    def time_at(self, progress: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the time at a progress from 0 (sigma_min) to 1 (sigma_max)."""
        warped = self._low + (self._high - self._low) * progress.double()
        sigma = warped.exp() if math.isinf(self.rho) else warped**self.rho
        # Clamped, because the power and its inverse can leave the interval by rounding.
        return (sigma / (1 + sigma)).clamp(self.t_min, self.t_max)

    def warp(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the progress from sigma_min to sigma_max."""
        return (self._power(self._sigma(t)) - self._low) / (self._high - self._low)

    def dwarp_dt(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the derivative of ``warp`` in t; 0 below t_min."""
        sigma = self._sigma(t)
        slope = 1 / sigma if math.isinf(self.rho) else sigma ** (1 / self.rho - 1) / self.rho
        # ``warp`` is constant below t_min, by the clamp in ``_sigma``.
        inside = (t.double() >= self.t_min).double()
        return inside * slope * (1 + sigma).square() / (self._high - self._low)

    def network_time(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the function of sigma that ``network_input`` names."""
        sigma = self._sigma(t)
        if self.network_input == "sigma":
            return sigma
        return sigma.log() / 4 if self.network_input == "log" else sigma.atan() * 2 / math.pi

    def alpha_sigma(self, t: Float[Tensor, " batch"]) -> tuple[Tensor, Tensor]:
        """Return 1 and sigma."""
        t = t.double()
        return torch.ones_like(t), t / (1 - t)

    def scale(self, t: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return ``1 + sigma = 1 / (1 - t)``."""
        return 1 / (1 - t.double())

    def grid(self, steps: int) -> Float[Tensor, " points"]:
        """Return times of equal progress, and 0 at the end."""
        check_steps(steps, self.num_timesteps)
        times = self.time_at(torch.arange(steps, -1, -1, dtype=torch.float64) / steps)
        # Stock schedulers append sigma = 0: the last step goes from sigma_min to data.
        times[-1] = 0
        return times

    def to_config(self) -> dict[str, Any]:
        """Return the noise levels as JSON; ``rho`` is None for equal steps of log sigma."""
        rho = None if math.isinf(self.rho) else self.rho
        ends = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
        return {"kind": self.kind, "network_time": self.network_input} | ends | {"rho": rho}

    def is_uniform(self, steps: int) -> bool:
        """Return True: jumps are measured by the progress."""
        return True
