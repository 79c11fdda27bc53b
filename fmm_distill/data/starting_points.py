"""Where jumps start: points x_t of data, of the prior, or of the student's own jumps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fmm_distill.core.device import to_device
from fmm_distill.core.draws import draw
from fmm_distill.core.time_axis import expand

if TYPE_CHECKING:
    from collections.abc import Callable

    from jaxtyping import Float
    from torch import Tensor

    from fmm_distill.core.conditioning import Conditioning
    from fmm_distill.core.draws import Draws
    from fmm_distill.core.velocity import VelocityField
    from fmm_distill.data.samples import Picked
    from fmm_distill.teachers.base import Distillable

    Mover = Callable[[Tensor, Tensor, Tensor, Conditioning | None], Tensor]

__all__ = ["condition_of", "interpolant_velocity", "points", "somewhere", "teacher_jump"]


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
        end, place = to_device(t[asked], x.device), to_device(asked, x.device)
        start = torch.full_like(end, teacher.schedule.t_max)
        told = None if cond is None else cond.rows(place)
        moved = mover(x[place], start, end, told)[: len(rows)]
        x = x.index_copy(0, place[: len(rows)], moved.to(x.dtype))
    rows = (inside & ~jumps).nonzero()[:, 0]
    if data is not None and len(rows):
        own = data.rows(rows).points(draws.rows(rows), t[rows])
        x = x.index_copy(0, to_device(rows, x.device), own.to(x.dtype))
    return x


def condition_of(teacher: Distillable, draws: Draws) -> Conditioning | None:
    """What the samples' networks are told, on the samples' device."""
    if teacher.conditions is None:
        return None
    cond = teacher.conditions.pick(draws.condition)
    if teacher.guidance is not None:
        cond = teacher.guidance.at(cond, draws.guidance)
    return cond.to(draws.noise.device)


def somewhere(teacher: Distillable, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Conditioning | None]:
    """x, t, r and the condition of a jump of two samples from pure noise, to try networks on."""
    draws = draw(0, 0, 2, teacher.event_shape).part(0, 2, device)
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    return teacher.prior(draws.noise), t, t / 2, condition_of(teacher, draws)
