"""The closed-form velocity field and flow map of a mixture with two modes."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.flow_map import FlowMap
from fmm_distill.core.time_axis import LinearClock, expand
from fmm_distill.teachers.closed_form.gaussian import Gaussian, deviation

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning

__all__ = ["TwoModes"]


class TwoModes(FlowMap):
    """Data with two modes at +center and -center, of equal weight, each N(., std^2 I). Samples are vectors.

    Along the line through the modes the flow map preserves quantiles; orthogonal to it, it is the map of ``Gaussian``.
    """

    clock = LinearClock()
    t_max = 1.0

    def __init__(self, center: Float[Tensor, " dim"], std: float) -> None:
        self.center, self.std = center, std
        self.offset = float(center.norm())
        self.direction = center / self.offset
        self.across = Gaussian(torch.zeros_like(center), std)

    def denoise(self, x: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Return ``E[x_0 | alpha x_0 + sigma eps = x]`` on any Gaussian path."""
        a, s = expand(alpha, x), expand(sigma, x)
        variance = a.square() * self.std**2 + s.square()
        lean = torch.tanh(a * (x @ self.center).unsqueeze(1) / variance)
        gain = a * self.std**2 / variance
        return lean * self.center + gain * (x - a * lean * self.center)

    def velocity(self, x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return ``(x - x0_hat) / t``, in a form that is finite at t = 0."""
        s = expand(t, x)
        spread = deviation(s, self.std)
        lean = torch.tanh((1 - s) * (x @ self.center).unsqueeze(1) / spread.square())
        mean = lean * self.center
        return (s - (1 - s) * self.std**2) / spread.square() * (x - (1 - s) * mean) - mean

    def mean_velocity_of_jump(self, x: Tensor, t: Tensor, h: Tensor, cond: Conditioning | None = None) -> Tensor:
        """Return u of the quantile map; at h = 0 the velocity, without the derivative in h of the map."""
        along = x @ self.direction
        # The map is odd, and on the negative side the distribution function does not saturate at 1.
        side = torch.where(along > 0, -1.0, 1.0)
        moved = side * self._quantile_map(side * along, t, t - h)
        across = x - along.unsqueeze(1) * self.direction
        u_across = self.across.mean_velocity_of_jump(across, t, h)
        diagonal = h == 0
        # A divisor of 1 where h = 0: ``where`` alone would leave a NaN in the gradient.
        quotient = (along - moved) / torch.where(diagonal, 1.0, h)
        u_along = torch.where(diagonal, self.velocity(x, t) @ self.direction, quotient)
        return u_across + u_along.unsqueeze(1) * self.direction

    def _distribution(self, y: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the cumulative distribution and the density at t along the line."""
        spread, center = deviation(t, self.std), (1 - t) * self.offset
        a, b = (y - center) / spread, (y + center) / spread
        cumulative = (torch.special.ndtr(a) + torch.special.ndtr(b)) / 2
        density = ((-a.square() / 2).exp() + (-b.square() / 2).exp()) / (2 * math.sqrt(2 * math.pi) * spread)
        return cumulative, density

    def _quantile_map(self, y: Tensor, t: Tensor, r: Tensor) -> Tensor:
        level, _ = self._distribution(y, t)
        fixed, end = level.detach(), r.detach()
        # 80 halvings of an interval of length 100 end far below the spacing of float64.
        low, high = torch.full_like(fixed, -50.0), torch.full_like(fixed, 50.0)
        for _ in range(80):
            middle = (low + high) / 2
            above = self._distribution(middle, end)[0] > fixed
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        # One Newton step from the detached root gives it the first derivatives of the implicit function.
        root = (low + high) / 2
        reached, density = self._distribution(root, r)
        return root - (reached - level) / density.detach()
