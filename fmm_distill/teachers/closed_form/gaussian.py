"""The closed-form velocity field and flow map of a Gaussian."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock, expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning

__all__ = ["Gaussian", "deviation"]


def deviation(t: Tensor, std: float) -> Tensor:
    """Return the standard deviation at t of data with standard deviation ``std``."""
    return ((1 - t).square() * std**2 + t.square()).sqrt()


class Gaussian(FlowMap):
    """Data N(mean, std^2 I): the field is ``velocity``, the flow map the object itself, for times in [0, 1]."""

    clock = LinearClock()
    t_max = 1.0

    def __init__(self, mean: Float[Tensor, "*event"], std: float) -> None:
        self.mean, self.std = mean, std

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return ``E[x_0 | alpha x_0 + sigma eps = x]`` on any Gaussian path."""
        a, s = expand(alpha, x), expand(sigma, x)
        # The posterior mean of a Gaussian: the prior mean, and a fraction of the residual.
        gain = a * self.std**2 / (a.square() * self.std**2 + s.square())
        return self.mean + gain * (x - a * self.mean)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return ``-mean + (x - (1 - t) mean) (t - (1 - t) std^2) / S(t)^2``, with S(t) the deviation at t."""
        s = expand(t, x)
        slope = (s - (1 - s) * self.std**2) / deviation(s, self.std).square()
        return slope * (x - (1 - s) * self.mean) - self.mean

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return u of the linear map on whose trajectories ``(x_t - (1 - t) mean) / S(t)`` is constant."""
        # (S(t) - S(r)) / (t - r) with the difference canceled by hand: it is exact at t = r too.
        s, e = expand(t, x), expand(t - h, x)
        start, end = deviation(s, self.std), deviation(e, self.std)
        gain = ((s + e) - (2 - s - e) * self.std**2) / (start * (start + end))
        return gain * (x - (1 - s) * self.mean) - self.mean
