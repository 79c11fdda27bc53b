"""A closed-form velocity field with sharp edges: a checkerboard on the plane."""

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
# Of the uniform distribution on the white squares: 1/3 is the variance of [-1, 1].
_COVARIANCE = torch.tensor([[1 / 3, 1 / 16], [1 / 16, 1 / 3]], dtype=torch.float64)
# For larger t the intervals of the board are so short compared with the spread of the posterior that differences of
# distribution functions cancel. The first order of the posterior mean in 1 - t is used there.
_NEAR_NOISE = 1 - 1e-4


class Checkerboard:
    """Data uniform on the 8 white squares of a 4x4 board on [-1, 1]^2, with noise of the data's standard deviation.

    The path is ``x_t = (1 - t) x_0 + t scale eps``. As t goes to 0, the field grows like 1/t at the edges of the
    squares.
    """

    # The standard deviation of each coordinate of the data.
    scale = 1 / math.sqrt(3)

    def sample(self, count: int, generator: torch.Generator) -> Float[Tensor, "count 2"]:
        """Return points of the data, in float64."""
        row = torch.randint(4, (count,), generator=generator)
        column = 2 * torch.randint(2, (count,), generator=generator) + row % 2
        within = torch.rand(count, 2, generator=generator, dtype=torch.float64)
        return (torch.stack([row, column], 1) + within) / 2 - 1

    def denoise(self, x: Float[Tensor, "batch 2"], t: Float[Tensor, " batch"]) -> Float[Tensor, "batch 2"]:
        """Return ``E[x_0 | x_t = x]``.

        The posterior is a normal distribution truncated to the white squares. On a square it factorizes into one
        interval per axis.
        """
        precise, time = x.double(), expand(t.double(), x.double())
        # Clamped although ``where`` takes the other branch there: the gradient of this one would be NaN.
        early = time.clamp_max(_NEAR_NOISE)
        center, spread = precise / (1 - early), early * self.scale / (1 - early)
        log_mass, mean = _intervals(center, spread)
        logits = log_mass[:, 0, :, None] + log_mass[:, 1, None, :] + _WHITE.log().to(x.device)
        weights = logits.flatten(1).softmax(1).unflatten(1, (4, 4))
        inside = torch.stack([(weights.sum(2) * mean[:, 0]).sum(1), (weights.sum(1) * mean[:, 1]).sum(1)], 1)
        far = (1 - time) / (time * self.scale).square() * (precise @ _COVARIANCE.to(x.device))
        # A mean of data is on the board; rounding or the first order can put it outside.
        return torch.where(time > _NEAR_NOISE, far, inside).clamp(-1, 1).to(x.dtype)

    def velocity(
        self,
        x: Float[Tensor, "batch 2"],
        t: Float[Tensor, " batch"],
        cond: Conditioning | None = None,
    ) -> Float[Tensor, "batch 2"]:
        """Return ``E[scale eps - x_0 | x_t = x] = (x - x0_hat) / t``, for t of at least 0.02."""
        return (x - self.denoise(x, t)) / expand(t, x)


def _intervals(center: Tensor, spread: Tensor) -> tuple[Tensor, Tensor]:
    """Return log mass and mean of N(center, spread^2) truncated to the four intervals of the board (the last axis).

    In logarithms, since the masses of a point far off the board underflow.
    """
    edges = _EDGES.to(center.device)
    z = (edges - center[..., None]) / spread[..., None]
    low, high = z[..., :-1], z[..., 1:]
    # An interval in the upper tail is mirrored: close to 1 a distribution function has no digits left.
    upper = low > 0
    near, far = torch.where(upper, -low, high), torch.where(upper, -high, low)
    log_near, log_far = torch.special.log_ndtr(near), torch.special.log_ndtr(far)
    log_mass = log_near + torch.log1p(-(log_far - log_near).exp())
    log_density = -z.square() / 2 - math.log(math.sqrt(2 * math.pi))
    slope = (log_density[..., :-1] - log_mass).exp() - (log_density[..., 1:] - log_mass).exp()
    mean = center[..., None] + spread[..., None] * slope
    return log_mass, torch.minimum(torch.maximum(mean, edges[:-1]), edges[1:])
