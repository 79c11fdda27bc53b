"""Closed-form truth with sharp edges: the velocity field of a checkerboard on the plane."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch

from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning

__all__ = ["Checkerboard"]

_EDGES = torch.linspace(-1, 1, 5, dtype=torch.float64)
_WHITE = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]] * 2, dtype=torch.float64)
_COVARIANCE = torch.tensor([[1 / 3, 1 / 16], [1 / 16, 1 / 3]], dtype=torch.float64)
# Beyond it the board's intervals are too short beside the posterior's spread for differences of distributions.
_NEAR_NOISE = 1 - 1e-4


class Checkerboard:
    """Data uniform on the 8 white squares of a 4x4 board on [-1, 1]^2; noise scaled to the data's deviation.

    The path is ``x_t = (1 - t) x_0 + t scale eps``. The field grows like 1/t at the squares' edges as t goes to 0.
    """

    scale = 1 / math.sqrt(3)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count 2"]:
        """Points of the data, in float64."""
        row = torch.randint(4, (count,), generator=generator)
        column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
        within = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        return (torch.stack([row, column], 1) + within) / 2 - 1

    def denoise(self, x: Float[Tensor, "batch 2"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch 2"]:
        """``E[x_0 | x_t = x]``: a normal cut to the white squares, which factorises into intervals of the axes."""
        precise, time = x.double(), expand(t.double(), x.double())
        early = time.clamp_max(_NEAR_NOISE)
        center, spread = precise / (1 - early), early * self.scale / (1 - early)
        log_mass, mean = _intervals(center, spread)
        logits = log_mass[:, 0, :, None] + log_mass[:, 1, None, :] + _WHITE.log().to(x.device)
        share = logits.flatten(1).softmax(1).unflatten(1, (4, 4))
        inside = torch.stack([(share.sum(2) * mean[:, 0]).sum(1), (share.sum(1) * mean[:, 1]).sum(1)], 1)
        far = (1 - time) / (time * self.scale).square() * (precise @ _COVARIANCE.to(x.device))
        return torch.where(time > _NEAR_NOISE, far, inside).clamp(-1, 1).to(x.dtype)

    def velocity(
        self,
        x: Float[Tensor, "batch 2"],
        t: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch 2"]:
        """``E[scale eps - x_0 | x_t = x] = (x - x0_hat) / t``, for t of at least 0.02."""
        return (x - self.denoise(x, t)) / expand(t, x)


def _intervals(center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Logarithm of the mass and mean of N(center, spread^2) cut to each of the board's four intervals (a last axis).

    In logarithms, so that a point far off the board still has its nearest square.
    """
    edges = _EDGES.to(center.device)
    z = (edges - center[..., None]) / spread[..., None]
    low, high = z[..., :-1], z[..., 1:]
    # An interval in the upper tail is taken as its mirror image, where the distribution keeps its digits.
    upper = low > 0
    near, far = torch.where(upper, -low, high), torch.where(upper, -high, low)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    log_mass = log_near + torch.log1p(-(log_far - log_near).exp())
    log_density = -z.square() / 2 - math.log(math.sqrt(2 * math.pi))
    slope = (log_density[..., :-1] - log_mass).exp() - (log_density[..., 1:] - log_mass).exp()
    mean = center[..., None] + spread[..., None] * slope
    return log_mass, torch.minimum(torch.maximum(mean, edges[:-1]), edges[1:])
