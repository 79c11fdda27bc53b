"""Where jumps start and end: the draws of a step, the pairs (t, r), and the points x_t."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.interpolant import expand
from fmm_distill.losses.base import Settings
from fmm_distill.transfer import sent

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    from fmm_distill.data import Picked
    from fmm_distill.interpolant import TimeAxis
    from fmm_distill.teachers.base import Distillable
    from fmm_distill.velocity import Conditioning, VelocityField

    Mover = Callable[[Tensor, Tensor, Tensor, Conditioning | None], Tensor]

__all__ = ["Draws", "Pairs", "diagonal_times", "draw", "interpolant_velocity", "pair_times", "points", "teacher_jump"]


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


@dataclass
class Draws:
    """The random numbers of some samples of one step, each from a stream of its own.

    Numbers of ``[batch]`` stay on the CPU: what is decided by them is decided without waiting for a GPU.

    Attributes:
        noise: N(0, I), shape ``[batch, *event]``; where the networks are.
        first, second: uniform on [0, 1], shape ``[batch]``: the two times.
        kind: uniform on [0, 1], shape ``[batch]``: what jump it is.
        image: uniform on [0, 1], shape ``[batch]``: which image of a dataset.
        share: uniform on [0, 1], shape ``[batch]``: what a loss draws itself, such as a middle time.
        condition: uniform on [0, 1], shape ``[batch]``: what the network is told besides.
        guidance: uniform on [0, 1], shape ``[batch]``: the scale in its range, where students are told it.
        flip: uniform on [0, 1], shape ``[batch]``: whether its image is mirrored.
        policy: uniform on [0, 1], shape ``[batch]``: whether it starts from the student's own jump although there is
            data.
        place: in [0, 1), shape ``[batch]``: the sample's place, spread evenly in every part of a batch; which term
            of a sum of losses it goes to.
    """

    noise: Float[Tensor, "batch *event"]
    first: Float[Tensor, " batch"]
    second: Float[Tensor, " batch"]
    kind: Float[Tensor, " batch"]
    image: Float[Tensor, " batch"]
    share: Float[Tensor, " batch"]
    condition: Float[Tensor, " batch"]
    guidance: Float[Tensor, " batch"]
    flip: Float[Tensor, " batch"]
    policy: Float[Tensor, " batch"]
    place: Float[Tensor, " batch"]

    def part(self, start: int, stop: int, device: torch.device | str) -> Draws:
        """Samples ``start`` to ``stop`` of the batch, their noise on ``device``."""
        some = {name: values[start:stop] for name, values in vars(self).items()}
        return Draws(**some | {"noise": sent(some["noise"], device)})

    def rows(self, index: Int[Tensor, " some"]) -> Draws:
        """The samples at these rows, counted on the CPU."""
        some = {name: values[index] for name, values in vars(self).items() if name != "noise"}
        return Draws(self.noise[sent(index, self.noise.device)], **some)


def draw(seed: int, step: int, batch: int, event_shape: tuple[int, ...]) -> Draws:
    """The draws of a whole step: a function of the seed, the step and the place in a batch of this size."""

    def stream(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def uniform(name: str) -> Tensor:
        return torch.rand(batch, generator=stream(name), dtype=torch.float64)

    noise = torch.randn(batch, *event_shape, generator=stream("noise"))
    names = ("first", "second", "kind", "image", "share", "condition", "guidance", "flip", "policy")
    # Multiples of the golden ratio: any stretch of them fills the unit interval evenly.
    place = torch.arange(batch, dtype=torch.float64) * ((5**0.5 - 1) / 2) % 1
    return Draws(noise, **{name: uniform(name) for name in names}, place=place)


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


def teacher_jump(teacher: Distillable, steps: int = 8) -> Mover:
    """The teacher's own map by ``steps`` Euler steps, equal in time: where a student can't be asked yet."""

    def move(x: Tensor, t: Tensor, r: Tensor, cond: Conditioning | None = None) -> Tensor:
        step = (t - r) / steps
        for i in range(steps):
            x = x - expand(step, x) * teacher.velocity(x, t - i * step, cond)
        return x

    return move


def interpolant_velocity(noise: Float[Tensor, "batch *event"], images: Float[Tensor, "batch *event"]) -> VelocityField:
    """The sample's own velocity ``eps - x_0``, the same at every time: what losses from data take for v."""

    def velocity(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        return noise - images

    return velocity


@torch.no_grad()
def points(
    teacher: Distillable,
    mover: Mover,
    draws: Draws,
    t: Float[Tensor, " batch"],
    data: Picked | None,
    cond: Conditioning | None = None,
    *,
    on_path: bool = False,
    on_policy: float = 0.0,
    in_step: bool = False,
) -> Float[Tensor, "batch *event"]:
    """Where the jumps start, at their times t: the data's own points, or detached jumps of ``mover`` from noise.

    At t_max it is the teacher's prior either way, unless ``on_path`` asks for the image's own point, which the
    sample's own velocity belongs to.

    Args:
        t: best on the CPU, as the draws are; on a GPU the host waits for it.
        on_policy: share of the samples that start from a jump of ``mover`` although there is data.
        in_step: ``mover`` is called although no sample here needs it, as long as another process's may.
    """
    if data is not None and on_path:
        return data.points(draws, t)
    x = teacher.prior(draws.noise)
    t = t.cpu()
    inside = t < teacher.schedule.t_max
    jumps = inside if data is None else inside & (draws.policy < on_policy)
    rows = jumps.nonzero()[:, 0]
    if len(rows) or (in_step and (data is None or on_policy > 0)):
        asked = rows if len(rows) else rows.new_zeros(1)
        end, place = sent(t[asked], x.device), sent(asked, x.device)
        start = torch.full_like(end, teacher.schedule.t_max)
        told = None if cond is None else cond.rows(place)
        moved = mover(x[place], start, end, told)[: len(rows)]
        x = x.index_copy(0, place[: len(rows)], moved.to(x.dtype))
    rows = (inside & ~jumps).nonzero()[:, 0]
    if data is not None and len(rows):
        own = data.rows(rows).points(draws.rows(rows), t[rows])
        x = x.index_copy(0, sent(rows, x.device), own.to(x.dtype))
    return x
