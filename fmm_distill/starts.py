"""Where jumps start and end: the draws of a step, the pairs (t, r), and the points x_t."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Self

import torch
from pydantic import Field, model_validator

from fmm_distill.interpolant import expand
from fmm_distill.losses.base import Settings

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float, Int
    from torch import Tensor

    from fmm_distill.interpolant import Schedule
    from fmm_distill.teachers.base import Teacher

    Mover = Callable[[Tensor, Tensor, Tensor], Tensor]

__all__ = ["Draws", "Pairs", "draw", "pair_times", "points", "teacher_jump"]


class Pairs(Settings):
    """The distribution of the pairs (t, r)."""

    prior: float = Field(default=0.5, ge=0, le=1)
    """Share of the jumps that start from pure noise at t_max: the ones that one-step sampling makes."""
    diagonal: float = Field(default=0.0, ge=0, le=1)
    """Share of the jumps of length 0, which regress the student's velocity on the teacher's."""
    spacing: Literal["timestep", "time"] = "timestep"
    """What t and r are uniform in: the teacher's timesteps, or the time axis itself."""

    @model_validator(mode="after")
    def _shares(self) -> Self:
        if self.prior + self.diagonal > 1:
            raise ValueError(f"prior and diagonal are shares of one batch; their sum is {self.prior + self.diagonal}")
        return self


@dataclass
class Draws:
    """The random numbers of some samples of one step, each from a stream of its own.

    Attributes:
        noise: N(0, I), shape ``[batch, *event]``.
        first, second: uniform on [0, 1], shape ``[batch]``: the two times.
        kind: uniform on [0, 1], shape ``[batch]``: what jump it is.
        image: uniform on [0, 1], shape ``[batch]``: which image of a dataset.
    """

    noise: Float[Tensor, "batch *event"]
    first: Float[Tensor, " batch"]
    second: Float[Tensor, " batch"]
    kind: Float[Tensor, " batch"]
    image: Float[Tensor, " batch"]

    def part(self, start: int, stop: int, device: torch.device | str) -> Draws:
        """Samples ``start`` to ``stop`` of the batch, on ``device``."""
        return Draws(**{name: values[start:stop].to(device) for name, values in vars(self).items()})


def draw(seed: int, step: int, batch: int, event_shape: tuple[int, ...]) -> Draws:
    """The draws of a whole step: a function of the seed, the step and the place in a batch of this size."""

    def stream(name: str) -> torch.Generator:
        digest = hashlib.sha256(f"{seed} {step} {name}".encode()).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))

    def uniform(name: str) -> Tensor:
        return torch.rand(batch, generator=stream(name), dtype=torch.float64)

    noise = torch.randn(batch, *event_shape, generator=stream("noise"))
    return Draws(noise, uniform("first"), uniform("second"), uniform("kind"), uniform("image"))


def pair_times(pairs: Pairs, schedule: Schedule, draws: Draws) -> tuple[Tensor, Tensor]:
    """Times t >= r in [t_min, t_max] in float64, shape ``[batch]`` each.

    The share that starts at t_max takes its r from one uniform, the rest is uniform on the triangle. Data itself
    (r = 0) is no target of training: beyond t_min the map is the teacher's last step, a straight line.
    """
    t, r = torch.maximum(draws.first, draws.second), torch.minimum(draws.first, draws.second)
    from_noise = draws.kind < pairs.prior
    t, r = torch.where(from_noise, 1.0, t), torch.where(from_noise, draws.second, r)
    r = torch.where(draws.kind >= 1 - pairs.diagonal, t, r)
    if pairs.spacing == "time":
        span = schedule.t_max - schedule.t_min
        return schedule.t_min + span * t, schedule.t_min + span * r
    return _time_at(schedule, t), _time_at(schedule, r)


def _time_at(schedule: Schedule, share: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
    """The time at a share of the way from the first timestep to the last, linear between timesteps."""
    place = share * (schedule.num_timesteps - 1)
    below: Int[Tensor, " batch"] = place.long().clamp_max(schedule.num_timesteps - 2)
    return torch.lerp(schedule.time(below), schedule.time(below + 1), place - below)


def teacher_jump(teacher: Teacher, steps: int = 8) -> Mover:
    """The teacher's own map by ``steps`` Euler steps, equal in time: where a student can't be asked yet."""

    def move(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
        step = (t - r) / steps
        for i in range(steps):
            x = x - expand(step, x) * teacher.velocity(x, t - i * step)
        return x

    return move


@torch.no_grad()
def points(
    teacher: Teacher,
    mover: Mover,
    draws: Draws,
    t: Float[Tensor, " batch"],
    images: Float[Tensor, "batch *event"] | None,
) -> Float[Tensor, "batch *event"]:
    """Where the jumps start, at their times t: noised images, or (without data) detached jumps of ``mover``.

    At t_max it is the teacher's prior either way.
    """
    prior = teacher.prior(draws.noise)
    at_start = t >= teacher.schedule.t_max
    if images is not None:
        moved = expand(1 - t, images) * images + expand(t, images) * draws.noise
    elif bool(at_start.all()):
        return prior
    else:
        moved = prior.clone()
        rest = ~at_start
        start = torch.full_like(t, teacher.schedule.t_max)[rest]
        moved[rest] = mover(prior[rest], start, t[rest])
    return torch.where(expand(at_start, prior).bool(), prior, moved)
