"""Distribution matching: the student's samples, noised again, move along the difference of two velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import squared_norm
from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.core.velocity import VelocityField

__all__ = ["DistributionMatching", "NoisedSamples"]

# Of the mean absolute distance to the teacher's estimate, in units of the data: the weight of a sample is bounded.
_SMALLEST_DISTANCE = 0.02


@dataclass(frozen=True)
class NoisedSamples:
    """Generated samples with fresh noise, ``x_t = (1 - t) x_0 + t eps``.

    Attributes:
        x_0: clean samples, at the end of a map's jumps, with their graph; shape ``[batch, *event]``.
        noise: eps, N(0, I), independent of the noise that the samples were generated from.
        t: times, float64, shape ``[batch]``.
        cond: what the samples were generated from and both velocities are conditioned on.
    """

    x_0: Float[Tensor, "batch *event"]
    noise: Float[Tensor, "batch *event"]
    t: Float[Tensor, " batch"]
    cond: Conditioning | None

    @property
    def x_t(self) -> Float[Tensor, "batch *event"]:
        """The noised samples."""
        t = expand(self.t, self.x_0)
        return (1 - t) * self.x_0 + t * self.noise

    @property
    def velocity(self) -> Float[Tensor, "batch *event"]:
        """The conditional velocity ``v_c = eps - x_0``, whose mean at x_t is the velocity of the generated samples."""
        return self.noise - self.x_0


class DistributionMatching(Settings):
    """The gradient of a divergence between the generated distribution and the teacher's."""

    summary: ClassVar[str] = "the distribution of the student's samples moves towards the teacher's"
    paper: ClassVar[str] = "DMD arXiv 2311.18828; DMD2 arXiv 2405.14867"

    name: Literal["distribution_matching"] = "distribution_matching"
    """Name of the loss."""
    divergence: Literal["kl", "fisher"] = "kl"
    """Reverse Kullback-Leibler divergence, without a backward pass through either velocity, or the Fisher family."""
    balance: float = Field(default=0.0, ge=-2, le=2)
    """The factor A of ``|d|^2`` in the Fisher family."""
    distance: Literal["squared", "pseudo_huber"] = "squared"
    """Distance of the Fisher family between both velocities."""
    times: tuple[float, float] = (0.02, 0.98)
    """Smallest and largest time of the noise, as fractions of the teacher's timesteps; uniform between them."""

    def times_at(self, axis: TimeAxis, uniform: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the times of uniform numbers in [0, 1]."""
        low, high = self.times
        return axis.time_at(low + (high - low) * uniform)

    def __call__(
        self, samples: NoisedSamples, teacher: VelocityField, critic: VelocityField
    ) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``, whose gradient in x_0 is that of the divergence."""
        x_t, t, cond = samples.x_t, samples.t, samples.cond
        time = expand(t, x_t)
        with torch.no_grad():
            v_teacher, v_critic = teacher(x_t.detach(), t, cond), critic(x_t.detach(), t, cond)
            difference = v_teacher - v_critic
            estimate = x_t - time * v_teacher
            distance = (samples.x_0 - estimate).flatten(1).abs().mean(1).clamp_min(_SMALLEST_DISTANCE)
            target = samples.x_0 - time * difference / expand(distance, x_t)
        return 0.5 * squared_norm(samples.x_0 - target)
