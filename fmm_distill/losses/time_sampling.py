"""The distribution of the times (t, r) that a loss is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.losses.settings import Settings

if TYPE_CHECKING:
    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.draws import Draws
    from fmm_distill.core.time_axis import TimeAxis

__all__ = ["TimeSampling", "sample_diagonal_times", "sample_times"]


class TimeSampling(Settings):
    """The distribution of the times (t, r) at which jumps start and end."""

    prior: float = Field(default=0.5, ge=0, le=1)
    """Fraction of the jumps that start from pure noise at t_max: the ones that one-step sampling makes."""
    data: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the jumps that end at t_min, next to data: the ones that consistency models make."""
    diagonal: float = Field(default=0.0, ge=0, le=1)
    """Fraction of the jumps of length 0, which regress the student's velocity on the teacher's."""
    dyadic: int = Field(default=0, ge=0, le=10)
    """Jumps of 1, 1/2, ... 2^-dyadic of the way from noise to data, from multiples of their length; 0: any jump."""
    grid: int = Field(default=0, ge=0, le=1_000_000)
    """Jumps start and end on a grid of this many equal steps: t is rounded up, r down; 0: any times."""
    band_steps: int = Field(default=0, ge=0, le=40_000_000)
    """Steps over which the longest jump grows from a tenth of its length to all of it; 0: full length at once."""
    groups: int = Field(default=0, ge=0, le=1_000_000)
    """Number of pairs (t, r) in a batch, each shared by equally many samples; 0: each sample has its own. A scaled
    student forms its weights once per pair, in place of a second product per layer."""
    spacing: Literal["timestep", "time"] = "timestep"
    """Scale on which t and r are fractions: the teacher's timesteps, or the time axis itself."""
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of each of the two times before they are sorted, as a fraction of the way from data to noise."""
    logit_mean: float = Field(default=0.0, ge=-10, le=10)
    """Mean of logit_normal: below 0 nearer to data (MeanFlow, arXiv 2505.13447: -0.4)."""
    logit_std: float = Field(default=1.0, gt=0, le=10)
    """Standard deviation of logit_normal."""

    @model_validator(mode="after")
    def _fractions(self) -> Self:
        total = self.prior + self.data + self.diagonal
        if total > 1:
            raise ValueError(
                f"prior, data and diagonal are fractions of one batch: expected a sum of at most 1, got {total}"
            )
        uniform = self.distribution == "uniform"
        if self.dyadic and (total or self.band_steps or self.grid or not uniform):
            raise ValueError(
                "dyadic sets the start and the end of every jump: set prior, data, diagonal, grid and band_steps to 0 "
                "and distribution to uniform"
            )
        if uniform and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std act on distribution: logit_normal only")
        return self

    def longest_jump(self, step: int) -> float:
        """Return the fraction of its length that the longest jump of a step has."""
        # A tenth, because a student that starts as the teacher is right on short jumps alone.
        return 1.0 if step >= self.band_steps else 0.1 + 0.9 * step / self.band_steps


def sample_times(
    sampling: TimeSampling, axis: TimeAxis, draws: Draws, step: int
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return times t >= r in [t_min, t_max] in float64, shape ``[batch]`` each.

    Jumps from t_max take r from one draw, jumps to t_min take t from one draw, and the others are a sorted pair of
    draws. No jump ends at data itself (r = 0): beyond t_min the map is the teacher's last step, a straight line.
    """
    t, r = _dyadic(sampling.dyadic, draws) if sampling.dyadic else _triangle(sampling, draws, step)
    return _time_at(sampling, axis, t), _time_at(sampling, axis, r)


def sample_diagonal_times(sampling: TimeSampling, axis: TimeAxis, draws: Draws) -> Float[Tensor, " batch"]:
    """Return times in [t_min, t_max] in float64, shape ``[batch]``, from one draw of the distribution each.

    The times at which jumps start are the later of two draws, half of them t_max: too few of those are near data to
    learn a velocity there.
    """
    return _time_at(sampling, axis, _quantile(sampling, draws.first))


def _time_at(sampling: TimeSampling, axis: TimeAxis, fraction: Tensor) -> Tensor:
    if sampling.spacing == "time":
        return axis.t_min + (axis.t_max - axis.t_min) * fraction
    return axis.time_at(fraction)


def _triangle(sampling: TimeSampling, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
    """Return t and r as fractions of the way from t_min to t_max."""
    first, second = (_quantile(sampling, uniform) for uniform in (draws.first, draws.second))
    # Two draws of one distribution, the later of which is the start, as in mean flow.
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    # The kind has a draw of its own, so that another prior leaves the times of the other samples as they are.
    from_noise = draws.kind < sampling.prior
    t, r = torch.where(from_noise, 1.0, t), torch.where(from_noise, second, r)
    to_data = ~from_noise & (draws.kind < sampling.prior + sampling.data)
    t, r = torch.where(to_data, second, t), torch.where(to_data, 0.0, r)
    if step < sampling.band_steps:
        # The end moves and the start stays, so that starts have their distribution during the warm-up too.
        r = t - (t - r) * sampling.longest_jump(step)
    # Outward, so that no jump gets the length 0.
    if sampling.grid:
        t, r = (t * sampling.grid).ceil() / sampling.grid, (r * sampling.grid).floor() / sampling.grid
    # The other end of the same draw: with a sum of at most 1 the three kinds never overlap.
    return t, torch.where(draws.kind >= 1 - sampling.diagonal, t, r)


def _quantile(sampling: TimeSampling, uniform: Tensor) -> Tensor:
    """Return a draw of one time from its quantile."""
    if sampling.distribution == "uniform":
        return uniform
    # A draw of exactly 0 is -infinity here, and its sigmoid 0 again: no clamp is necessary.
    return torch.sigmoid(sampling.logit_mean + sampling.logit_std * torch.special.ndtri(uniform))


def _dyadic(levels: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Return the ends of a level's interval: each level with equal chance, then each of its intervals."""
    # The product of a draw just below 1 can round up to the next integer.
    level = (draws.first * (levels + 1)).long().clamp_max(levels)
    count = torch.exp2(level.double())
    interval = (draws.second * count).floor().clamp_max(count - 1)
    return (interval + 1) / count, interval / count
