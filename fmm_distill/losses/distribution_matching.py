"""Distribution matching: the student's samples, noised again, move along the difference of two velocities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, field_validator, model_validator

from fmm_distill.core.time_axis import expand
from fmm_distill.losses.base import squared_norm
from fmm_distill.losses.settings import Settings
from fmm_distill.losses.weighting import Distance, measure

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.time_axis import TimeAxis
    from fmm_distill.core.velocity import VelocityField

__all__ = ["Balance", "DistributionMatching", "MatchingLoss", "NoisedSamples", "RealData", "Times"]

_Fraction = Annotated[float, Field(ge=0, le=1)]
Times = tuple[_Fraction, _Fraction]
Balance = Annotated[float, Field(ge=-2, le=2)]

# Of the mean absolute distance to the teacher's estimate, in units of the data: the weight of a sample is bounded.
_SMALLEST_DISTANCE = 0.02
_OF_FISHER = ("balance", "distance", "constant", "time_power", "real")


@dataclass(frozen=True)
class NoisedSamples:
    """Clean samples with fresh noise, ``x_t = (1 - t) x_0 + t eps``.

    Attributes:
        x_0: clean samples, at the end of a map's jumps, with their graph; shape ``[batch, *event]``. The state right
            after a random step is still noisy and is no such sample: nothing here can detect it.
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
        """The conditional velocity ``v_c = eps - x_0``, whose mean at x_t is the velocity of these samples."""
        return self.noise - self.x_0


class RealData(Settings):
    """Images in the losses of the student and of the critic (RealUID, arXiv 2509.22459)."""

    a: float = Field(default=0.92, gt=0, lt=1)
    """Fraction of the generated samples in the distribution on which both velocities are compared; images have the
    rest."""
    b: float = Field(default=0.94, gt=0, lt=1)
    """Fraction of the generated samples' velocity in the critic's; equal to a, the critic is that of the mixture."""


class MatchingLoss(Settings):
    """A loss of the second stage: its fields are its settings, and a call evaluates it.

    With ``d = v_T - v_F``, where v_T is the teacher's velocity and v_F the critic's, that of the *generated*
    distribution, both at ``(x_t, t)``, and with ``v_c = eps - x_0``:

    - ``kl``: ``1/2 |x_0 - sg(x_0 - t d / n)|^2``, whose gradient in x_0 is ``t d / n``, that of the reverse
      Kullback-Leibler divergence at time t times ``(t / (1 - t))^2 / n``. No backward pass through v_T or v_F.
    - ``fisher``: ``w(t) / n [A D(d) + D'(d) . (v_F - v_c)]``, D the ``distance``, e.g. ``A |d|^2 + 2 d . (v_F - v_c)``,
      and ``w(t) = t^time_power``. The gradient passes through x_t, v_c and the inputs of both networks. With n = 1 its
      mean is the derivative of ``E w(t) D(v_T - v_F)`` in the student's weights: A = 1 the complete one, A = 0 the one
      with the distribution of x_t held fixed.
    - ``fisher`` with ``real``: ``w(t) / n [a |d|^2 + 2 d . (a v_F - b v_c)]``, and the critic's loss is
      ``losses.critic_loss`` with the same a and b.

    Norms and products are means over the event, and ``n = mean |x_0 - (x_t - t v_T)|``, gradient stopped
    (``weight: distance``), or 1.

    The weights of both networks must be frozen by the caller: ``fisher`` has a graph through the networks, and would
    accumulate a gradient in weights that require one.

    A subclass sets ``summary`` and ``paper``, and gives ``name`` a single literal value.

    Attributes:
        summary: one sentence for ``fmm-distill losses``.
        paper: the source of the loss.
    """

    summary: ClassVar[str]
    paper: ClassVar[str]

    name: str
    """Name of the loss."""
    divergence: Literal["kl", "fisher"] = "kl"
    """Reverse Kullback-Leibler divergence, without a backward pass through either velocity, or the Fisher family."""
    balance: Balance = 0.0
    """The factor A of ``D(d)`` in the Fisher family: 1 for the gradient of the divergence, 0 for the one with the
    distribution of x_t held fixed."""
    distance: Literal["squared", "pseudo_huber"] = "squared"
    """Distance D of the Fisher family between both velocities: the mean square, or
    ``sqrt(|d|^2 + constant^2) - constant``."""
    constant: float = Field(default=0.03, ge=1e-12, le=1e6)
    """Root mean square difference of the velocities at which pseudo_huber turns from square to linear. A constant of
    the sum over n coordinates is this one times ``sqrt(n)``."""
    weight: Literal["distance", "none"] = "distance"
    """Weight of a sample: the inverse of its mean absolute distance to the teacher's estimate of it, or none."""
    time_power: float = Field(default=2.0, ge=0, le=4)
    """Exponent of t in the weight of a time in the Fisher family: 2 compares estimates of x_0, 0 velocities."""
    real: RealData | None = None
    """Images that the critic learns from too; null: none. Acts with balance: 1 and distance: squared."""
    times: Times = (0.02, 0.98)
    """Smallest and largest time of the noise, as fractions of the teacher's timesteps; uniform between them."""

    @field_validator("times")
    @classmethod
    def _in_order(cls, times: tuple[float, float]) -> tuple[float, float]:
        low, high = times
        if not low < high:
            raise ValueError("expected the smallest time before the largest, such as 0.02, 0.98")
        return times

    @model_validator(mode="after")
    def _settings_act(self) -> Self:
        fields = type(self).model_fields
        if self.divergence == "kl":
            changed = [name for name in _OF_FISHER if getattr(self, name) != fields[name].default]
            if changed:
                raise ValueError(
                    f"{' and '.join(changed)}: expected divergence: fisher, in which alone they act, got kl"
                )
        if self.distance == "squared" and self.constant != fields["constant"].default:
            raise ValueError("constant acts on distance: pseudo_huber only")
        if self.real is not None and (self.balance, self.distance) != (1.0, "squared"):
            raise ValueError(
                f"real: expected balance: 1 and distance: squared, got {self.balance:g} and {self.distance}; "
                "try flow_generator_matching"
            )
        return self

    @property
    def needs_data(self) -> bool:
        """Return whether the critic learns from images too."""
        return self.real is not None

    def times_at(self, axis: TimeAxis, uniform: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Return the times of uniform numbers in [0, 1]."""
        low, high = self.times
        return axis.time_at(low + (high - low) * uniform)

    def __call__(
        self, samples: NoisedSamples, teacher: VelocityField, critic: VelocityField
    ) -> Float[Tensor, " batch"]:
        """Return the loss of each sample, shape ``[batch]``, whose gradient in x_0 is that of the divergence.

        Args:
            samples: generated samples.
            teacher: the teacher's velocity, guided if the teacher is.
            critic: the velocity of the generated distribution; both with frozen weights.
        """
        return self._kl(samples, teacher, critic) if self.divergence == "kl" else self._fisher(samples, teacher, critic)

    @torch.no_grad()
    def _inverse_weight(self, samples: NoisedSamples, x_t: Tensor, v_teacher: Tensor) -> Tensor:
        """Return n of each sample."""
        if self.weight == "none":
            return torch.ones_like(samples.t)
        estimate = x_t - expand(samples.t, x_t) * v_teacher
        difference = (samples.x_0 - estimate).flatten(1)
        precise = difference.to(torch.promote_types(difference.dtype, torch.float32))
        return precise.abs().mean(1).clamp_min(_SMALLEST_DISTANCE)

    def _kl(self, samples: NoisedSamples, teacher: VelocityField, critic: VelocityField) -> Tensor:
        with torch.no_grad():
            x_t, t, cond = samples.x_t, samples.t, samples.cond
            v_teacher = teacher(x_t, t, cond)
            difference = v_teacher - critic(x_t, t, cond)
            scale = t / self._inverse_weight(samples, x_t, v_teacher)
            target = samples.x_0 - expand(scale, x_t) * difference
        return 0.5 * squared_norm(samples.x_0 - target)

    def _fisher(self, samples: NoisedSamples, teacher: VelocityField, critic: VelocityField) -> Tensor:
        x_t, t, cond = samples.x_t, samples.t, samples.cond
        v_teacher, v_critic = teacher(x_t, t, cond), critic(x_t, t, cond)
        difference = v_teacher - v_critic
        squared = squared_norm(difference)
        # Of D in |d|^2, times 2: the derivative of D in d is this factor times d.
        slope = 2.0 if self.distance == "squared" else (squared + self.constant**2).rsqrt()
        a, b = (1.0, 1.0) if self.real is None else (self.real.a, self.real.b)
        value = a * self.balance * measure(squared, Distance(kind=self.distance, constant=self.constant))
        loss = value + slope * _mean_product(difference, a * v_critic - b * samples.velocity)
        return loss * (t**self.time_power / self._inverse_weight(samples, x_t, v_teacher)).to(loss.dtype)


class DistributionMatching(MatchingLoss):
    """Any loss of the two families by its settings, by default that of distribution matching distillation.

    ``divergence: kl`` is DMD's gradient with its weight: ``t d / n``.
    """

    summary: ClassVar[str] = (
        "the distribution of the student's samples moves along the reverse KL or a Fisher divergence"
    )
    paper: ClassVar[str] = "DMD arXiv 2311.18828; DMD2 arXiv 2405.14867"

    name: Literal["distribution_matching"] = "distribution_matching"
    """Name of the loss."""


def _mean_product(left: Tensor, right: Tensor) -> Tensor:
    """Return the mean over the event of a product, in float32 at least."""
    dtype = torch.promote_types(left.dtype, torch.float32)
    return (left.flatten(1).to(dtype) * right.flatten(1).to(dtype)).mean(1)
