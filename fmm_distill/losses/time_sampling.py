"""The distribution of the pairs (t, r) that a loss is trained on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.losses.base import Settings

if TYPE_CHECKING:
    from torch import Tensor

    from fmm_distill.core.draws import Draws
    from fmm_distill.core.time_axis import TimeAxis

__all__ = ["Pairs", "diagonal_times", "pair_times"]


class Pairs(Settings):
    """The distribution of the pairs (t, r)."""

    prior: float = Field(default=0.5, ge=0, le=1)
    """Share of the jumps that start from pure noise at t_max: the ones that one-step sampling makes."""
    data: float = Field(default=0.0, ge=0, le=1)
    """Share of the jumps that end at t_min, next to data: the ones that consistency models make."""
    diagonal: float = Field(default=0.0, ge=0, le=1)
    """Share of the jumps of length 0, which regress the student's velocity on the teacher's."""
    dyadic: int = Field(default=0, ge=0, le=10)
    """Jumps of 1, 1/2, ... 2^-dyadic of the whole way, from multiples of their length; 0: anywhere in the triangle."""
    grid: int = Field(default=0, ge=0, le=1_000_000)
    """Jumps start and end on a grid of so many equal steps: t is rounded up, r down; 0: anywhere."""
    band_steps: int = Field(default=0, ge=0, le=40_000_000)
    """Steps over which the longest jump grows from a tenth of its length to the whole; 0: whole from the start."""
    spacing: Literal["timestep", "time"] = "timestep"
    """What t and r are shares of: the teacher's timesteps, or the time axis itself."""
    distribution: Literal["uniform", "logit_normal"] = "uniform"
    """Of each of the two times before they are sorted, as a share of the way from data to noise."""
    logit_mean: float = Field(default=0.0, ge=-10, le=10)
    """Of logit_normal: below 0 nearer to data (MeanFlow, arXiv 2505.13447: -0.4)."""
    logit_std: float = Field(default=1.0, gt=0, le=10)
    """Of logit_normal."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        total = self.prior + self.data + self.diagonal
        if total > 1:
            raise ValueError(f"prior, data and diagonal are shares of one batch; their sum is {total}")
        uniform = self.distribution == "uniform"
        if self.dyadic and (total or self.band_steps or self.grid or not uniform):
            raise ValueError(
                "dyadic says where every jump starts and ends: set prior, data, diagonal, grid and band_steps to 0 and "
                "distribution to uniform"
            )
        if uniform and (self.logit_mean, self.logit_std) != (0.0, 1.0):
            raise ValueError("logit_mean and logit_std act on distribution: logit_normal only")
        return self


def pair_times(pairs: Pairs, axis: TimeAxis, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
    """Times t >= r in [t_min, t_max] in float64, shape ``[batch]`` each.

    The share that starts at t_max takes its r from one draw, the share that ends at t_min its t, the rest is a sorted
    pair of draws. Data itself (r = 0) is no target of training: beyond t_min the map is the teacher's last
    step, a straight line.
    """
    t, r = _dyadic(pairs.dyadic, draws) if pairs.dyadic else _triangle(pairs, draws, step)
    return _time_at(pairs, axis, t), _time_at(pairs, axis, r)


def diagonal_times(pairs: Pairs, axis: TimeAxis, draws: Draws) -> Tensor:
    """Times in [t_min, t_max] in float64, shape ``[batch]``, from one draw of the pairs' distribution each.

    The later of two draws, half of them at t_max, is where jumps start; it leaves a velocity few samples near data.
    """
    return _time_at(pairs, axis, _share(pairs, draws.first))


def _time_at(pairs: Pairs, axis: TimeAxis, share: Tensor) -> Tensor:
    if pairs.spacing == "time":
        return axis.t_min + (axis.t_max - axis.t_min) * share
    return axis.time_at(share)


def _triangle(pairs: Pairs, draws: Draws, step: int) -> tuple[Tensor, Tensor]:
    """Shares of the way that t and r have from t_min."""
    first, second = (_share(pairs, uniform) for uniform in (draws.first, draws.second))
    t, r = torch.maximum(first, second), torch.minimum(first, second)
    from_noise = draws.kind < pairs.prior
    t, r = torch.where(from_noise, 1.0, t), torch.where(from_noise, second, r)
    to_data = ~from_noise & (draws.kind < pairs.prior + pairs.data)
    t, r = torch.where(to_data, second, t), torch.where(to_data, 0.0, r)
    if step < pairs.band_steps:
        r = t - (t - r) * (0.1 + 0.9 * step / pairs.band_steps)
    if pairs.grid:
        t, r = (t * pairs.grid).ceil() / pairs.grid, (r * pairs.grid).floor() / pairs.grid
    return t, torch.where(draws.kind >= 1 - pairs.diagonal, t, r)


def _share(pairs: Pairs, uniform: Tensor) -> Tensor:
    """A draw of one time from its quantile."""
    if pairs.distribution == "uniform":
        return uniform
    return torch.sigmoid(pairs.logit_mean + pairs.logit_std * torch.special.ndtri(uniform))


def _dyadic(levels: int, draws: Draws) -> tuple[Tensor, Tensor]:
    """Shares of the way: a level with equal chance, then one of its intervals."""
    level = (draws.first * (levels + 1)).long().clamp_max(levels)
    count = torch.exp2(level.double())
    interval = (draws.second * count).floor().clamp_max(count - 1)
    return (interval + 1) / count, interval / count
