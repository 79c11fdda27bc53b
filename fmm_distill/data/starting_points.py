"""Starting points of jumps: points x_t of data, of the prior, or at the end of a map's own jumps from noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

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
    from fmm_distill.data.samples import Batch
    from fmm_distill.teachers.base import Distillable, Teacher

    Mover = Callable[[Tensor, Tensor, Tensor, Conditioning | None], Tensor]

__all__ = ["StartingPoints", "draw_conditioning", "interpolant_velocity", "probe_inputs", "teacher_jump"]


# Eight steps: the points only decide where the loss is evaluated, so Euler's error matters little.
def teacher_jump(teacher: Distillable, steps: int = 8) -> Mover:
    """Return the teacher's own map by ``steps`` Euler steps of equal length in time.

    It makes starting points while the student's jumps are still untrained.
    """

    def move(x: Tensor, t: Tensor, r: Tensor, cond: Conditioning | None = None) -> Tensor:
        step = (t - r) / steps
        for i in range(steps):
            x = x - expand(step, x) * teacher.velocity(x, t - i * step, cond)
        return x

    return move


def interpolant_velocity(noise: Float[Tensor, "batch *event"], images: Float[Tensor, "batch *event"]) -> VelocityField:
    """Return the sample's own velocity ``eps - x_0``, constant in time, which losses from data use as v."""

    def velocity(x: Tensor, t: Tensor, cond: Conditioning | None = None) -> Tensor:
        return noise - images

    return velocity


@dataclass(frozen=True)
class StartingPoints:
    """The points at which jumps start: those of the data, or detached jumps of a map from noise.

    At t_max a point is the teacher's prior in both cases, except with ``on_path``.

    Attributes:
        teacher: gives the prior and the time axis.
        mover: the map whose jumps from noise make the other points.
        data: the batch of data; None: every point is a jump of ``mover``.
        on_path: take the data's own point at every time, t_max included: the sample's own velocity belongs to it.
        on_policy: fraction of the samples that start from a jump of ``mover`` despite data.
        lockstep: call ``mover`` although no sample of this process needs it, as long as one of another process may.
    """

    teacher: Distillable
    mover: Mover
    data: Batch | None = None
    on_path: bool = False
    on_policy: float = 0.0
    lockstep: bool = False

    @torch.no_grad()
    def __call__(
        self, draws: Draws, t: Float[Tensor, " batch"], cond: Conditioning | None = None
    ) -> Float[Tensor, "batch *event"]:
        """Return the points x_t of samples at their times.

        Args:
            draws: the random numbers of the samples.
            t: times, best on the CPU like the draws; with times on a GPU the host waits for it.
            cond: what ``mover`` is conditioned on.
        """
        if self.data is not None and self.on_path:
            return self.data.points(draws, t)
        x = self.teacher.prior(draws.noise)
        t = t.cpu()
        inside = t < self.teacher.schedule.t_max
        jumps = inside if self.data is None else inside & (draws.policy < self.on_policy)
        x = self._moved(x, t, jumps.nonzero()[:, 0], cond)
        rows = (inside & ~jumps).nonzero()[:, 0]
        if self.data is not None and len(rows):
            own = self.data.rows(rows).points(draws.rows(rows), t[rows])
            x = x.index_copy(0, to_device(rows, x.device), own.to(x.dtype))
        return x

    def _moved(self, x: Tensor, t: Tensor, rows: Tensor, cond: Conditioning | None) -> Tensor:
        """Return the samples with those at these rows moved from t_max to their times."""
        may_be_called = self.data is None or self.on_policy > 0
        if not len(rows) and not (self.lockstep and may_be_called):
            return x
        # In lockstep the first sample is moved for nothing; the slices below drop its result.
        called = rows if len(rows) else rows.new_zeros(1)
        end, index = to_device(t[called], x.device), to_device(called, x.device)
        start = torch.full_like(end, self.teacher.schedule.t_max)
        moved = self.mover(x[index], start, end, None if cond is None else cond.rows(index))[: len(rows)]
        return x.index_copy(0, index[: len(rows)], moved.to(x.dtype))


def draw_conditioning(teacher: Distillable, draws: Draws) -> Conditioning | None:
    """Return what the networks are conditioned on for these samples, on the device of their noise."""
    if teacher.conditions is None:
        return None
    cond = teacher.conditions.pick(draws.condition)
    if teacher.guidance is not None:
        cond = teacher.guidance.at(cond, draws.guidance)
    return cond.to(draws.noise.device)


def probe_inputs(teacher: Distillable, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Conditioning | None]:
    """Return x, t, r and the condition of a jump of two samples from pure noise, to test networks with.

    Of a teacher with two networks the second sample has a time of the second one.
    """
    draws = draw(0, 0, 2, teacher.event_shape).part(0, 2, device)
    # At t_max, where a prediction of noise is divided by the smallest alpha.
    t = torch.full((2,), teacher.schedule.t_max, dtype=torch.float64, device=device)
    if (boundary := getattr(teacher, "boundary", None)) is not None:
        schedule = cast("Teacher", teacher).schedule
        times = schedule.time_at(torch.linspace(1, 0, 21, dtype=torch.float64))
        t[1] = times[schedule.network_time(times) < boundary][0]
    return teacher.prior(draws.noise), t, t / 2, draw_conditioning(teacher, draws)
